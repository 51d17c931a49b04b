"""litellm: OpenAI's and Anthropic's door, streamed, a tool, a JSON schema."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # do not fetch it

from litellm import completion
from pydantic import BaseModel

HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str
    age: int


def ask(model, base, messages, **more):
    return completion(model=model, api_base=base, api_key="unused", messages=messages, num_retries=0, **more)


openai = ("openai/tiny", f"{sys.argv[1]}/v1")
anthropic = ("anthropic/tiny", sys.argv[1])
weather = [{"role": "user", "content": "What is the weather?"}]
(call,) = ask(*openai, weather, tools=[TOOL]).choices[0].message.tool_calls
(other,) = ask(*anthropic, weather, tools=[TOOL], max_tokens=100).choices[0].message.tool_calls
person = ask(*openai, [{"role": "user", "content": "Name a person."}], response_format=Person)
print(
    json.dumps(
        {
            "text": ask(*openai, HI).choices[0].message.content,
            "streamed": "".join(part.choices[0].delta.content or "" for part in ask(*openai, HI, stream=True)),
            "tool": [call.function.name, json.loads(call.function.arguments)],
            "parsed": json.loads(person.choices[0].message.content),
            "by_anthropic": ask(*anthropic, HI, max_tokens=200).choices[0].message.content,
            "streamed_by_anthropic": "".join(
                part.choices[0].delta.content or "" for part in ask(*anthropic, HI, max_tokens=200, stream=True)
            ),
            "tool_by_anthropic": [other.function.name, json.loads(other.function.arguments)],
        }
    )
)
