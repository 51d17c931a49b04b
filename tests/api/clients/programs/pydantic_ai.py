"""pydantic-ai: an agent with a tool, streamed, and with a typed result."""

import asyncio
import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="unused"))
called = []


class Person(BaseModel):
    """A person."""

    name: str
    age: int


plain = Agent(model)
with_tool = Agent(model)


@with_tool.tool_plain
def get_weather(city: str) -> str:
    """The weather in a city."""
    called.append(["get_weather", {"city": city}])
    return "sunny"


async def main() -> dict:
    async with plain.run_stream("Hi") as run:
        streamed = [text async for text in run.stream_text(delta=True)]
    after = await with_tool.run("What is the weather?")
    person = await Agent(model, output_type=NativeOutput(Person)).run("Name a person.")
    return {
        "text": (await plain.run("Hi")).output,
        "streamed": "".join(streamed),
        "tool": called[0],
        "after": after.output,
        "parsed": person.output.model_dump(),
    }


print(json.dumps(asyncio.run(main())))
