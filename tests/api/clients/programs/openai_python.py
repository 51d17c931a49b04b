"""openai: a chat whole and streamed, a tool call, a pydantic model, the Responses API."""

import json
import sys

from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)
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


whole = client.chat.completions.create(model="tiny", messages=HI)
stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
ask = [{"role": "user", "content": "What is the weather?"}]
asked = client.chat.completions.create(model="tiny", messages=ask, tools=[TOOL])
(call,) = asked.choices[0].message.tool_calls
result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
after = client.chat.completions.create(model="tiny", messages=[*ask, asked.choices[0].message, result], tools=[TOOL])
parsed = client.chat.completions.parse(
    model="tiny", messages=[{"role": "user", "content": "Name a person."}], response_format=Person
)
response = client.responses.create(model="tiny", input="Hi")
print(
    json.dumps(
        {
            "text": whole.choices[0].message.content,
            "streamed": streamed,
            "tool": [call.function.name, json.loads(call.function.arguments)],
            "after": after.choices[0].message.content,
            "parsed": parsed.choices[0].message.parsed.model_dump(),
            "response": response.output_text,
        }
    )
)
