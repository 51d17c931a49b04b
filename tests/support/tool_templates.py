"""Chat templates that know tools, one in the manner of each family, and a tokenizer with their control tokens."""

from __future__ import annotations

from small_tokenizers import byte_level_backend
from tokenizers import AddedToken, Tokenizer

CONTROL_TOKENS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '<|"|>', "<｜sep｜>", "<|call|>"]

HERMES = (  # Hermes, Qwen: JSON of everything, results in a user's turn
    "{% set answer = '<|im_start|>assistant\n' %}{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}<tools>"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools> Use <tool_call></tool_call>.<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{{ answer }}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ answer }}{% endif %}"
)
LLAMA = (  # Llama 3.1: one call to a message, results as JSON of a text
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>ipython\n\n{{ m.content | tojson }}<|im_end|>"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}"
    "{% endif %}{% set call = m.tool_calls[0].function %}<|im_start|>assistant\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>'
    "{% else %}<|im_start|>{{ m.role }}\n\n{% if loop.first and tools %}{% for tool in tools %}"
    "{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MISTRAL = (  # Mistral: ids of nine letters, or an error
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% elif m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.tool_calls is defined %}[TOOL_CALLS][{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('ids of 9') }}{% endif %}{% set out = call.function | tojson %}{{ out[:-1] }}, "
    '"id": "{{ call.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]<|im_end|>'
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% else %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids of 9') }}{% endif %}[TOOL_RESULTS]"
    '{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% endif %}{% endfor %}'
)
DEEPSEEK = (  # DeepSeek V3: arguments are text, calls only beside a null content, no tools
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}{% for call in m.tool_calls %}"
    "{{ '<tool_call>' + call.type + '<｜sep｜>' + call.function.name + '\n```json\n' + call.function.arguments"
    " + '\n```' + '</tool_call>' }}{% endfor %}<|im_end|>"
    "{% elif m.role == 'tool' %}<tool_output>{{ m.content }}</tool_output>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMONY = (  # gpt-oss: schemas as TypeScript, the first call only, a result needs a call before it, `thinking`
    "{% macro kind(spec, depth) %}{% if spec.type == 'array' %}{{ kind(spec['items'], depth) }}[]"
    "{% elif spec.enum %}{{ spec.enum | map('tojson') | join(' | ') }}"
    "{% elif spec.type == 'object' and spec.properties %}{\n{% for name, inner in spec.properties.items() %}"
    "{{ name }}{{ '' if name in (spec.required or []) else '?' }}: {{ kind(inner, depth + 1) }},\n{% endfor %}}"
    "{% else %}{{ spec.type or 'any' }}{% endif %}{% endmacro %}"
    "{% if tools %}<|im_start|>developer\nnamespace functions {\n{% for tool in tools %}"
    "// {{ tool.function.description }}\ntype {{ tool.function.name }} = (_: {{ kind(tool.function.parameters, 0) }}) "
    "=> any;\n{% endfor %}}<|im_end|>{% endif %}{% set last = namespace(call=none) %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% if m.thinking %}<|im_start|>analysis\n{{ m.thinking }}<|im_end|>{% endif %}"
    "<|im_start|>assistant to=functions.{{ call.name }} json\n{{ call.arguments | tojson }}<|call|>"
    "{% set last.call = call.name %}{% elif m.role == 'tool' %}{% if last.call is none %}"
    "{{ raise_exception('no previous tool call') }}{% endif %}<|im_start|>functions.{{ last.call }} to=assistant\n"
    "{{ m.content | tojson }}<|im_end|>{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
GEMMA = (  # Gemma 4: a control token around every text, keys sorted, types in capitals
    "{% macro value(x) %}{% if x is string %}{{ '<|\"|>' + x + '<|\"|>' }}{% elif x is mapping %}("
    "{% for k, v in x | dictsort %}{{ k }}:{{ value(v) }},{% endfor %}){% elif x is sequence %}["
    "{% for v in x %}{{ value(v) }},{% endfor %}]{% else %}{{ x | tojson }}{% endif %}{% endmacro %}"
    "{% for tool in tools or [] %}<|im_start|>declaration:{{ tool.function.name }}("
    "{{ value(tool.function.description) }},{% for k, v in tool.function.parameters.properties | dictsort %}"
    "{{ k }}:{% if v.type | upper == 'STRING' %}{{ value(v.enum or []) }}{% endif %}"
    "{{ value(v.type | upper) }},{% endfor %})<|im_end|>{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>response:{{ m.name or 'unknown' }}"
    "({{ value(m.content) }})<|im_end|>{% else %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}<tool_call>call:{{ call.function.name }}"
    "{{ value(call.function.arguments) }}</tool_call>{% endfor %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
PYTHONIC = (  # Llama 4, LFM2: calls as Python
    "{% if tools %}<|im_start|>system\n{{ tools | map(attribute='function') | list | tojson(ensure_ascii=True) }}"
    "<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}["
    "{% for call in m.tool_calls %}{{ call.function.name }}({% for k, v in call.function.arguments.items() %}"
    "{{ k }}={{ v | tojson(ensure_ascii=True) }}{{ '' if loop.last else ', ' }}{% endfor %})"
    "{{ '' if loop.last else ', ' }}{% endfor %}]{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWN = (  # as Python shows a dict: what careless templates do
    "{% if tools %}<|im_start|>system\n{{ tools }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments }}</tool_call>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "harmony": HARMONY,
    "gemma": GEMMA,
    "pythonic": PYTHONIC,
    "shown": SHOWN,
}


def tool_backend() -> Tokenizer:
    """A byte-level tokenizer with the families' control tokens; some are special, as in real tokenizers."""
    tokenizer = byte_level_backend()
    tokenizer.add_tokens([AddedToken(token, special=index % 2 == 0) for index, token in enumerate(CONTROL_TOKENS)])
    return tokenizer
