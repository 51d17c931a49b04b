"""langchain-openai: invoke, stream, a bound tool, structured output."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

chat = ChatOpenAI(model="tiny", base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


ask = HumanMessage("What is the weather?")
with_tool = chat.bind_tools([get_weather])
asked = with_tool.invoke([ask])
(call,) = asked.tool_calls
after = with_tool.invoke([ask, asked, ToolMessage("sunny", tool_call_id=call["id"])])
print(
    json.dumps(
        {
            "text": chat.invoke("Hi").content,
            "streamed": "".join(chunk.content for chunk in chat.stream("Hi")),
            "tool": [call["name"], call["args"]],
            "after": after.content,
            "parsed": chat.with_structured_output(Person).invoke("Name a person.").model_dump(),
        }
    )
)
