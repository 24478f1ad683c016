"""Chat templates that come with Muster, for tokenizers that bring none, and the reading of template files.

They are Jinja, as in Hugging Face tokenizers. Every one renders a conversation as a continuation of its own generation
prompt and ends assistant turns with a token that generation can stop at,
so that what is learnt is what is asked for later.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from training.errors import InputError

_SPLIT_SYSTEM = r"""
{%- if messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
"""

_REFUSE_TOOLS = r"""
{%- if tools -%}
{{- raise_exception('this template has no place for tools; use chatml or plain') -}}
{%- endif -%}
"""

PLAIN = r"""
{{- bos_token -}}
{%- if tools -%}
{{- 'Tools:\n' + (tools | tojson) + '\n\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- message.role | capitalize + ':\n' + message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\nCall: ' + (call.function | tojson) -}}
{%- endfor -%}
{{- (eos_token if message.role == 'assistant' else '') + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\n' -}}{%- endif -%}
"""

CHATML = (
    r"""
{%- if tools -%}
{{- '<|im_start|>system\nYou may call these functions. A call is {"name": ..., "arguments": {...}} """
    r"""between <tool_call> and </tool_call>.\n' -}}
{{- '<tools>\n' + (tools | tojson) + '\n</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

LLAMA2 = (
    _SPLIT_SYSTEM
    + _REFUSE_TOOLS
    + r"""
{%- for message in turns -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('turns must alternate: user, assistant, user, assistant; use chatml or plain') -}}
{%- endif -%}
{%- if message.role == 'user' -%}
{%- set opening = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first else '' -%}
{{- bos_token ~ '[INST] ' ~ opening ~ (message.content | trim) ~ ' [/INST]' -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' ~ (message.content | trim) ~ ' ' ~ eos_token -}}
{%- else -%}
{{- raise_exception('this template knows user and assistant turns, not ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
"""
)

ALPACA = (
    _SPLIT_SYSTEM + _REFUSE_TOOLS + r"""
{{- bos_token ~ (system or 'Below is an instruction that describes a task. """
    r"""Write a response that appropriately completes the request.') ~ '\n\n' -}}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- '### Instruction:\n' + message.content + '\n\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Response:\n' + message.content + eos_token + '\n\n' -}}
{%- else -%}
{{- raise_exception('this template knows user and assistant turns, not ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
"""
)

_FAMILIES = Path(__file__).parent / "chat_templates"
"""The templates of model families, with the answers marked for training.
Each renders what the template of the models named in it renders."""

TEMPLATES = {"plain": PLAIN, "chatml": CHATML, "llama2": LLAMA2, "alpaca": ALPACA}
TEMPLATES |= {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8") for path in sorted(_FAMILIES.glob("*.jinja"))
}
TEMPLATES["phi"] = TEMPLATES["phi4"]
TOKENIZER = "tokenizer"
SETTINGS = ("auto", "none", TOKENIZER)

_MARK = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def without_marks(template: str) -> str:
    """The same template without the marks for training, which not every program that reads chat templates knows."""
    return _MARK.sub(r"{#\1 \2#}", template)


def load(setting: str, base: Path) -> str | None:
    """The Jinja text that `data.template` names: a built-in or a file under `base`; None for auto, none and tokenizer.

    Raises InputError for an unknown name and for a file that cannot be read.
    """
    if setting in SETTINGS:
        return None
    return TEMPLATES.get(setting) or _file(setting, base)


def _file(setting: str, base: Path) -> str:
    path = base / os.path.expanduser(setting)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError.of("", _unknown(setting), what="data.template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError.of("", f"cannot read the template file {path}: {error}", what="data.template") from error


def _unknown(setting: str) -> str:
    known = (*SETTINGS, *TEMPLATES)
    close = difflib.get_close_matches(setting, known, n=1)
    advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}, or give the path of a Jinja file"
    return f"no template and no file is called `{setting}`; {advice}"
