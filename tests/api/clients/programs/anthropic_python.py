"""anthropic: a message whole and streamed, a tool call and its result."""

import json
import sys

from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1], api_key="unused", max_retries=0)
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
whole = client.messages.create(model="tiny", max_tokens=200, messages=HI)
with client.messages.stream(model="tiny", max_tokens=200, messages=HI) as stream:
    streamed = "".join(stream.text_stream)
ask = [{"role": "user", "content": "What is the weather?"}]
asked = client.messages.create(model="tiny", max_tokens=200, messages=ask, tools=[TOOL])
(call,) = [block for block in asked.content if block.type == "tool_use"]
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]}
answer = {"role": "assistant", "content": [block.model_dump() for block in asked.content]}
after = client.messages.create(model="tiny", max_tokens=200, messages=[*ask, answer, result], tools=[TOOL])
print(
    json.dumps(
        {
            "text": whole.content[0].text,
            "streamed": streamed,
            "tool": [call.name, call.input],
            "after": after.content[0].text,
        }
    )
)
