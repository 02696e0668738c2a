"""Small chat templates that behave as those of well-known models do, where it matters to what is learned."""

QWEN3 = """{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- set at = messages|length - 1 - loop.index0 %}
{%- if message.role == 'user' and ns.last == messages|length - 1 and not ns.found %}
{%- set ns.last = at %}{%- set ns.found = true %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role in ('system', 'user') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
"""Shows reasoning after the last question only, an empty one where there is none; calls as JSON."""

LLAMA3 = """{{- bos_token }}
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{{- '<|im_start|>system\\n\\nToday: ' + today + '<|im_end|>' }}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n\\n{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{{- '<|im_end|>' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>ipython\\n\\n' + message.content | tojson + '<|im_end|>' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n\\n' + message.content | trim + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"""
"""Writes the day, trims, leaves a call's words out, shows results as JSON and no tools."""

MISTRAL = """{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set rest = messages[1:] if system is not none else messages %}
{{- bos_token }}
{%- for message in rest %}
{%- if message.role == 'user' %}
{{- '[INST] ' + (system + '\\n\\n' if system is not none and loop.last else '') + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""
"""Puts the system text before the last question, opens no answer, and leaves out what it does not know."""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<|im_start|>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + message.content | trim }}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\\n' }}{%- endif %}"""
"""Refuses system turns and turns that do not alternate; calls the assistant otherwise."""

R1 = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] + eos_token }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
"""Asks for an answer with <think>, and leaves reasoning out when it shows one."""

PHI = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
"""Ends the conversation, not the answer, with EOS: whatever follows stands in its place."""

ROUNDS = """{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[Round ' ~ (loop.index0 // 2 + 1) ~ '] ' }}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Counts the turns."""

LLAMA3_TOOLS = """{%- if tools %}
{{- '<|im_start|>system\\n\\nAnswer with {"name": function name, "parameters": its arguments}.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{{- '<|im_end|>' }}
{%- endif %}
""" + LLAMA3[LLAMA3.index("{%- for message") :]
"""Shows tools in the system's turn; a call is the whole answer."""

MISTRAL_TOOLS = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == messages | selectattr('role', 'equalto', 'user') | list | last %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}"""
"""Shows tools before the last question; calls are a list with ids."""

GRANITE = """{%- if tools %}{{- '<|im_start|>available_tools\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- if message.tool_calls %}
{{- '<|tool_call|>[' }}
{%- for call in message.tool_calls %}
{{- call.function | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Calls are a list behind a tag that nothing closes."""
