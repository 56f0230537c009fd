"""Small tokenizers of single characters, built here: with and without BOS, chat template and generation blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<s>")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """(chat_template, adds_bos) -> tokenizer with a token a character; <|im_end|> is EOS and the padding, <s> BOS."""

    def make(chat_template: str | None = CHATML, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
        letters = [chr(code) for code in range(32, 127)] + ["\n"]
        characters = Tokenizer(WordLevel({token: i for i, token in enumerate([*SPECIALS, *letters])}, unk_token=" "))
        characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        characters.decoder = decoders.Fuse()
        characters.add_special_tokens(list(SPECIALS))
        if adds_bos:
            characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
        return PreTrainedTokenizerFast(
            tokenizer_object=characters, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>",
            chat_template=chat_template, clean_up_tokenization_spaces=False,
        )  # fmt: skip

    return make
