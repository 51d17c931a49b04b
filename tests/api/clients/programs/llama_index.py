"""llama-index: complete, stream_chat, a tool."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

chat = OpenAILike(
    model="tiny",
    api_base=f"{sys.argv[1]}/v1",
    api_key="unused",
    is_chat_model=True,
    is_function_calling_model=True,
    max_retries=0,
)


def get_weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


hi = [ChatMessage("Hi")]
tool = FunctionTool.from_defaults(get_weather)
asked = chat.chat_with_tools([tool], "What is the weather?")
(call,) = chat.get_tool_calls_from_response(asked)
print(
    json.dumps(
        {
            "text": chat.chat(hi).message.content,
            "streamed": "".join(part.delta or "" for part in chat.stream_chat(hi)),
            "tool": [call.tool_name, call.tool_kwargs],
        }
    )
)
