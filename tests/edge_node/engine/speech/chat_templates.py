"""Chat templates as real models bring them, their special tokens those of tests' tiny tokenizers.

E marks what ends a message, S what begins one; both are special tokens of the byte-level tiny tokenizer.
"""

from __future__ import annotations

E, S = "<|end|>", "<|start|>"

#: SmolLM2, Qwen 2.5: a system message of its own where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{S}system\nYou are a helpful assistant.{E}\n{{% endif %}}"
    f"{S}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{E}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{S}assistant\n{{% endif %}}"
)
LLAMA_3 = (
    "{{- bos_token }}{% for message in messages %}"
    f"{{{{- '{S}' + message['role'] + '<|other|>\n\n' + (message['content'] | trim) + '{E}' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{- '{S}assistant<|other|>\n\n' }}}}{{% endif %}}"
)
#: Roles between words that are no special tokens.
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
#: An end of text where no answer begins.
PHI_3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|other|>{% endif %}"
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant.') }}{% endif %}"
)
_MISTRAL = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for message in rest %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{% if loop.WHERE %}[INST] {{ system + message['content'] }} [/INST]"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}"
    "{% else %} {{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
#: The system message folded into the first question, and, as later ones do, into the last.
MISTRAL_FIRST = _MISTRAL.replace("WHERE", "first")
MISTRAL_LAST = _MISTRAL.replace("WHERE", "last")
#: Empty thoughts before an answer that is the last.
QWEN_3 = (
    f"{{% for message in messages %}}{S}{{{{ message['role'] }}}}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    f"{{{{ message['content'] }}}}{E}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{S}assistant\n{{% endif %}}"
)

TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": LLAMA_3,
    "Zephyr": ZEPHYR,
    "Phi-3": PHI_3,
    "Mistral, first": MISTRAL_FIRST,
    "Mistral, last": MISTRAL_LAST,
    "Qwen 3": QWEN_3,
}
