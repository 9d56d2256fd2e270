"""Chat templates that behave as those of well-known models do, written for these tests, and tokenizers for them.

Each says which behaviour it stands for. Only what decides where an answer stands is kept: dates, the makers' names
and the long explanations of tools are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Template:
    """A template, and what its model's tokenizer takes for one token.

    `added` tokens are no special ones: they are text that a model writes (`<think>`). Where a tokenizer `swallows`, its
    special tokens take the white space behind them along.
    """

    name: str
    jinja: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    swallows: bool = False


@lru_cache
def tokenizer_for(template: Template, *, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """Give a tokenizer of bytes with the template's tokens; `merges` join pairs, in BPE's letters (a space is Ġ)."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    core = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    special = [AddedToken(t, special=True, normalized=False, rstrip=template.swallows) for t in template.special]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in template.added])
    tokenizer.eos_token = tokenizer.pad_token = template.eos
    if template.bos:
        tokenizer.bos_token = template.bos
    tokenizer.chat_template = template.jinja
    return tokenizer


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHATML_PROMPT = r"{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
_CHATML_TURNS = (
    r"{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    + _CHATML_PROMPT
)
_CHATML_DEFAULT = (
    r"{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' -}}{%- endif -%}"
)

# String content; the text stays as it is.
CHATML = Template("chatml", _CHATML_TURNS, _CHATML_TOKENS, eos="<|im_end|>")

# Generation marks around what a model writes, and no more.
CHATML_MARKED = Template(
    "chatml-marked",
    r"""
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}"""
    + _CHATML_PROMPT,
    _CHATML_TOKENS,
    eos="<|im_end|>",
)

# A default system prompt. (The base models' end of text is another token than the end of a turn.)
QWEN2 = Template(
    "qwen2", _CHATML_DEFAULT + _CHATML_TURNS, (*_CHATML_TOKENS, "<|endoftext|>"), eos="<|im_end|>", bos="<|endoftext|>"
)

# A default system prompt; the end of a turn is the tokenizer's eos_token and its start the bos_token.
SMOLLM2 = Template("smollm2", _CHATML_DEFAULT + _CHATML_TURNS, _CHATML_TOKENS, eos="<|im_end|>", bos="<|im_start|>")

_TEXT = r"{%- macro text(m) -%}{{- m.content -}}{%- endmacro -%}"
_TEXT_OR_PARTS = r"""
{%- macro text(m) -%}
{%- if m.content is string -%}{{- m.content -}}
{%- else -%}
{%- for part in m.content -%}{{- part.text if part.type == 'text' else '<|image_pad|>' -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}"""
_ANSWER = r"{%- set said = text(m) -%}{{- said -}}"
_ANSWER_WITH_THOUGHT = r"""
{%- set said = text(m) -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if not thought and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.index0 > asked.last and (loop.last or thought) -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') -}}
{%- else -%}
{{- said -}}
{%- endif -%}"""


def _qwen(*, text: str = _TEXT, answer: str = _ANSWER, default: str = "") -> str:
    """Tools in the system turn, calls in the answer's, results in the user's, where those in a row share a turn."""
    turns = r"""
{%- set asked = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- set system = text(messages[0]) if messages[0].role == 'system' else DEFAULT -%}
{%- if system or tools -%}
{{- '<|im_start|>system\n' + system -}}
{%- if tools -%}
{{- ('\n\n' if system else '') + '# Tools\n' + (tools | map('tojson') | join('\n')) -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{- '<|im_start|>user' if loop.previtem.role != 'tool' else '' -}}
{{- '\n<tool_response>\n' + text(m) + '\n</tool_response>' -}}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
{%- elif m.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
ANSWER
{%- for call in m.tool_calls or [] -%}
{{- '\n' if said or not loop.first else '' -}}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif m.role == 'user' or not loop.first -%}
{{- '<|im_start|>' + m.role + '\n' + text(m) + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}"""
    return text + turns.replace("DEFAULT", repr(default)).replace("ANSWER", answer) + _CHATML_PROMPT


_QWEN_TOKENS = (*_CHATML_TOKENS, "<|endoftext|>")
_QWEN_TOOL_TOKENS = ("<tool_call>", "</tool_call>")

# A default system prompt, tools, calls as <tool_call> beside an answer's text.
QWEN2_5 = Template("qwen2.5", _qwen(default="Be helpful."), _QWEN_TOKENS, eos="<|im_end|>", added=_QWEN_TOOL_TOKENS)

# Thinking, in the content or as reasoning_content: thoughts before the last question are stripped, the last answer gets
# an empty one where it has none, and those since the last question stay if there are any. Tools.
QWEN3 = Template(
    "qwen3",
    _qwen(answer=_ANSWER_WITH_THOUGHT)
    + r"{%- if add_generation_prompt and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
    _QWEN_TOKENS,
    eos="<|im_end|>",
    added=(*_QWEN_TOOL_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>"),
)

# Content as a string or as a list of parts. Tools.
QWEN3_VL = Template(
    "qwen3-vl",
    _qwen(text=_TEXT_OR_PARTS),
    (*_QWEN_TOKENS, "<|image_pad|>"),
    eos="<|im_end|>",
    added=_QWEN_TOOL_TOKENS,
)

# Content as a list of parts alone: a plain string is dropped without a word.
SMOLVLM = Template(
    "smolvlm",
    r"""
{{- '<|im_start|>' -}}
{%- for m in messages -%}
{{- (m.role | capitalize) + ': ' -}}
{%- for part in m.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}""",
    ("<|im_start|>", "<end_of_utterance>"),
    eos="<end_of_utterance>",
    bos="<|im_start|>",
)

# Trims. One call a turn (it raises for more), with the answer's text dropped beside it; results as JSON in a role
# of their own; tools in front of the first question.
LLAMA3 = Template(
    "llama3",
    r"""
{%- macro head(role) -%}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' -}}{%- endmacro -%}
{{- bos_token -}}
{%- set told = namespace(yes=not tools) -%}
{%- for m in messages -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length > 1 -%}{{- raise_exception('only one call at a time') -}}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- head('assistant') + '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' -}}
{%- elif m.role == 'tool' -%}
{{- head('ipython') + (m.content | tojson) -}}
{%- else -%}
{{- head(m.role) -}}
{%- if m.role == 'user' and not told.yes -%}
{{- 'Call one of these:\n' + (tools | map('tojson') | join('\n')) + '\n\n' -}}
{%- set told.yes = true -%}
{%- endif -%}
{{- m.content | trim -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- head('assistant') -}}{%- endif -%}""",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
)

# No system role: the system prompt stands in front of the first question. The assistant has another name. Content as
# a string or as a list. Trims. Raises where roles do not alternate. The end of a turn is not the eos_token.
GEMMA3 = Template(
    "gemma3",
    _TEXT_OR_PARTS
    + r"""
{{- bos_token -}}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for m in turns -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' -}}
{%- if loop.first and messages[0].role == 'system' -%}{{- text(messages[0]) + '\n\n' -}}{%- endif -%}
{{- (text(m) | trim) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}""",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    bos="<bos>",
)

_ALTERNATE = r"""
{%- for m in turns if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
{%- endfor -%}"""

# No system role: it raises, as it does where roles do not alternate. [INST] is text, a space stands before an answer,
# and the eos_token ends it.
MISTRAL = Template(
    "mistral",
    r"{%- set turns = messages -%}"
    + _ALTERNATE
    + r"""
{{- bos_token -}}
{%- for m in turns -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
{%- else -%}{{- raise_exception('only user and assistant roles') -}}
{%- endif -%}
{%- endfor -%}""",
    ("<s>", "</s>"),
    eos="</s>",
    bos="<s>",
)

# The system prompt stands in the last message if that is a question, so a row that ends with an answer loses it. Tools
# before the last question; calls begin with a special token; raises where a call's id is not nine letters long.
MISTRAL_V3 = Template(
    "mistral-v3",
    r"{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}"
    + _ALTERNATE
    + r"""
{{- bos_token -}}
{%- set questions = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- for m in turns -%}
{%- if m.role == 'user' -%}
{%- if tools and m == questions[-1] -%}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST] ' -}}
{%- if loop.last and messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}
{{- m.content + '[/INST]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{- raise_exception('a call id has nine letters') -}}{%- endif -%}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) -}}
{{- ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- else -%}
{{- ' ' + m.content + eos_token -}}
{%- endif -%}
{%- endfor -%}""",
    (
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    eos="</s>",
    bos="<s>",
)

# A system role with marks of its own; no space before an answer.
MISTRAL_V7 = Template(
    "mistral-v7",
    r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}
{%- elif m.role == 'user' -%}{{- '[INST]' + m.content + '[/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- m.content + eos_token -}}
{%- else -%}{{- raise_exception('no such role') -}}
{%- endif -%}
{%- endfor -%}""",
    ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    eos="</s>",
    bos="<s>",
)

# Special tokens that take the white space behind them along, an answer's too; an eos_token behind the last turn.
PHI3 = Template(
    "phi3",
    r"""
{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}""",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    swallows=True,
)

# Turns with no white space between them.
PHI4 = Template(
    "phi4",
    r"""
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}""",
    (*_CHATML_TOKENS, "<|im_sep|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    bos="<|endoftext|>",
)

# Generation marks around whole turns, headers and all. A system prompt always; /no_think in it puts an empty thought
# before every answer. Answers lose line breaks in front. Calls are dropped.
SMOLLM3 = Template(
    "smollm3",
    r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set mode = '/no_think' if '/no_think' in system else '/think' -%}
{%- set orders = system.replace('/no_think', '').replace('/think', '').rstrip() -%}
{{- '<|im_start|>system\nReasoning Mode: ' + mode + '\n\n' + (orders or 'Be helpful.') + '\n\n<|im_end|>\n' -}}
{%- set head = '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' -}}
{%- elif m.role == 'assistant' -%}
{%- generation -%}{{- head + m.content.lstrip('\n') + '<|im_end|>\n' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- head -}}{%- endif -%}""",
    (*_CHATML_TOKENS, "<|end_of_text|>"),
    eos="<|im_end|>",
    added=("<think>", "</think>"),
)

_BAR, _BLOCK = "\uff5c", "\u2581"
R1_START, R1_END = (f"<{_BAR}{word}{_BLOCK}of{_BLOCK}sentence{_BAR}>" for word in ("begin", "end"))
R1_USER, R1_ASSISTANT = (f"<{_BAR}{role}{_BAR}>" for role in ("User", "Assistant"))

# Strips every thought, the last too. The system prompt stands bare at the start; special tokens are no ASCII.
DEEPSEEK_R1 = Template(
    "deepseek-r1",
    r"""
{{- bos_token -}}
{%- for m in messages if m.role == 'system' -%}{{- m.content -}}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- 'USER' + m.content -}}
{%- elif m.role == 'assistant' -%}{{- 'ASSISTANT' + m.content.split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT<think>\n' -}}{%- endif -%}""".replace("USER", R1_USER).replace(
        "ASSISTANT", R1_ASSISTANT
    ),
    (R1_START, R1_END, R1_USER, R1_ASSISTANT),
    eos=R1_END,
    bos=R1_START,
    added=("<think>", "</think>"),
)
