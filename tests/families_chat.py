"""Chat templates and special tokens in the shape that each model family has on the Hub, in our own wording."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chat:
    """
    The text side of a family.

    Attributes:
        template: Jinja chat template.
        eos: End-of-sequence token of the tokenizer.
        pad: Padding token, never the same as `eos`.
        bos: Token that begins a conversation, if the family has one.
        end_of_turn: What the template writes after an assistant's text, blanks aside; `eos` if empty.
        adds_bos: Whether the tokenizer puts `bos` in front by itself when `add_special_tokens=True`.
        image: Token that stands once per image feature in `input_ids`.
        placeholder: Token that the template writes per image and that the processor expands; `image` if empty.
        others: Further special tokens.
        named: Tokens that the processor reads off the tokenizer by attribute name.
    """

    template: str
    eos: str
    pad: str
    image: str
    bos: str | None = None
    end_of_turn: str = ""
    adds_bos: bool = False
    placeholder: str = ""
    others: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens, each once, in a fixed order."""
        tokens = [self.pad, self.bos, self.eos, self.image, self.placeholder, self.end_of_turn]
        tokens += [*self.named.values(), *self.others]
        return list(dict.fromkeys(token for token in tokens if token))


def _blocks(image: str, video: str = "", trim: str = "") -> str:
    """Jinja that writes the content of `m`: a string, or blocks in their order."""
    video_branch = "{%- elif c['type'] == 'video' %}{{- '" + video + "' }}" if video else ""
    return (
        "{%- if m['content'] is string %}{{- m['content']" + trim + " }}{%- else %}{%- for c in m['content'] %}"
        "{%- if c['type'] == 'image' %}{{- '" + image + "' }}" + video_branch + "{%- elif c['type'] == 'text' %}"
        "{{- c['text']" + trim + " }}{%- endif %}{%- endfor %}{%- endif %}"
    )


_IMAGES_FIRST = "{%- for c in m['content'] if c['type'] == 'image' %}{{- '<image>\n' }}{%- endfor %}"
_TEXTS = "{%- for c in m['content'] if c['type'] == 'text' %}{{- c['text'] }}{%- endfor %}"

_QWEN_BLOCKS = _blocks("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
_CHATML_TURN = "{{- '<|im_start|>' + m['role'] + '\n' }}" + _QWEN_BLOCKS + "{{- '<|im_end|>\n' }}"
_CHATML_GENERATION = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"

# Qwen2-VL and Qwen2.5-VL open with a default system turn; Qwen3-VL does not.
QWEN2_TEMPLATE = (
    "{%- for m in messages %}{%- if loop.first and m['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    + _CHATML_TURN
    + "{%- endfor %}"
    + _CHATML_GENERATION
)
QWEN3_TEMPLATE = "{%- for m in messages %}" + _CHATML_TURN + "{%- endfor %}" + _CHATML_GENERATION
# Assistant turns after the last user turn carry a think block; earlier ones do not.
QWEN3_5_TEMPLATE = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{{- '<|im_start|>' + m['role'] + '\n' }}{%- if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}" + _QWEN_BLOCKS + "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}"
)
# The system text moves into the first user turn, the assistant is called "model", and texts are stripped.
GEMMA3_TEMPLATE = (
    "{{- bos_token }}{%- set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{%- set ns.system = (m['content'] if m['content'] is string else m['content'][0]['text']) + '\n\n' %}"
    "{%- else %}{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + ns.system }}"
    "{%- set ns.system = '' %}" + _blocks("<start_of_image>", trim=" | trim") + "{{- '<end_of_turn>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
GEMMA4_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    + _blocks("<|image|>", "<|video|>", trim=" | trim")
    + "{{- '<turn|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>model\n' }}{%- endif %}"
)
# The LLaVA and Idefics templates read blocks alone: `content` as a string fails or writes nothing.
LLAVA_TEMPLATE = (
    "{%- for m in messages %}{%- if m['role'] != 'system' %}{{- m['role'].upper() + ': ' }}{%- endif %}"
    + _IMAGES_FIRST
    + _TEXTS
    + "{{- '</s>' if m['role'] == 'assistant' else ' ' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)
LLAVA_NEXT_TEMPLATE = (
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{{- '<<SYS>>\n' }}" + _TEXTS + "{{- '\n<</SYS>>\n\n' }}"
    "{%- elif m['role'] == 'user' %}{{- '[INST] ' }}" + _IMAGES_FIRST + _TEXTS + "{{- ' [/INST]' }}"
    "{%- else %}{{- ' ' }}" + _TEXTS + "{{- '</s> ' }}{%- endif %}{%- endfor %}"
)
LLAVA_ONEVISION_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + ' ' }}"
    + _IMAGES_FIRST
    + _IMAGES_FIRST.replace("image", "video")
    + "{%- if m['role'] != 'assistant' %}{{- '\n' }}{%- endif %}"
    + _TEXTS
    + "{{- '<|im_end|>' }}{%- endfor %}"
    + _CHATML_GENERATION
)
INTERNVL_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}"
    + _blocks("<IMG_CONTEXT>\n", "<video>\n")
    + "{{- '<|im_end|>\n' }}{%- endfor %}"
    + _CHATML_GENERATION
)
_IDEFICS_TURNS = (
    "{%- for m in messages %}{{- m['role'].capitalize() + (':' if m['content'][0]['type'] == 'image' else ': ') }}"
    + _blocks("<image>")
    + "{{- '<end_of_utterance>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)
SMOLVLM_TEMPLATE = "{{- '<|im_start|>' }}" + _IDEFICS_TURNS
IDEFICS3_TEMPLATE = "{{- '<|begin_of_text|>' }}" + _IDEFICS_TURNS
MISTRAL3_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' }}"
    + _blocks("[IMG]")
    + "{{- '[/SYSTEM_PROMPT]' }}{%- elif m['role'] == 'user' %}{{- '[INST]' }}"
    + _blocks("[IMG]")
    + "{{- '[/INST]' }}{%- else %}"
    + _blocks("[IMG]")
    + "{{- eos_token }}{%- endif %}{%- endfor %}"
)
GLM4V_TEMPLATE = (
    "{{- '[gMASK]<sop>' }}{%- for m in messages %}{{- '\n<|' + m['role'] + '|>\n' }}"
    + _blocks("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>")
    + "{%- if m['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\n<|assistant|>\n' }}{%- endif %}"
)
AYA_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|START_OF_TURN_TOKEN|><|' + {'user': 'USER', 'system': 'SYSTEM',"
    " 'assistant': 'CHATBOT'}[m['role']] + '_TOKEN|>' }}"
    + _blocks("<image>")
    + "{{- '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)

_QWEN_OTHERS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
_IDEFICS_OTHERS = (
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def _qwen(template: str) -> Chat:
    return Chat(template, eos="<|im_end|>", pad="<|endoftext|>", image="<|image_pad|>", others=_QWEN_OTHERS)


CHATS: dict[str, Chat] = {
    "qwen2_vl": _qwen(QWEN2_TEMPLATE),
    "qwen2_5_vl": _qwen(QWEN2_TEMPLATE),
    "qwen3_vl": _qwen(QWEN3_TEMPLATE),
    "qwen3_vl_moe": _qwen(QWEN3_TEMPLATE),
    "qwen3_5": _qwen(QWEN3_5_TEMPLATE),
    "gemma3": Chat(
        GEMMA3_TEMPLATE,
        eos="<eos>",
        end_of_turn="<end_of_turn>",
        pad="<pad>",
        image="<image_soft_token>",
        bos="<bos>",
        adds_bos=True,
        placeholder="<start_of_image>",
        others=("<start_of_turn>",),
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    "gemma4": Chat(
        GEMMA4_TEMPLATE,
        eos="<eos>",
        end_of_turn="<turn|>",
        pad="<pad>",
        image="<|image|>",
        bos="<bos>",
        adds_bos=True,
        others=("<|turn>", "<|video|>"),
        named={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
    ),
    "llava": Chat(LLAVA_TEMPLATE, eos="</s>", pad="<pad>", image="<image>", bos="<s>", adds_bos=True),
    "llava_next": Chat(LLAVA_NEXT_TEMPLATE, eos="</s>", pad="<pad>", image="<image>", bos="<s>", adds_bos=True),
    "llava_onevision": Chat(
        LLAVA_ONEVISION_TEMPLATE,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image="<image>",
        others=("<|im_start|>", "<video>"),
    ),
    "internvl": Chat(
        INTERNVL_TEMPLATE,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image="<IMG_CONTEXT>",
        others=("<|im_start|>",),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": Chat(
        SMOLVLM_TEMPLATE,
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        image="<image>",
        bos="<|im_start|>",
        others=(*_IDEFICS_OTHERS, "<video>"),
    ),
    "idefics3": Chat(
        IDEFICS3_TEMPLATE,
        eos="<end_of_utterance>",
        pad="<|end_of_text|>",
        image="<image>",
        bos="<|begin_of_text|>",
        adds_bos=True,
        others=_IDEFICS_OTHERS,
    ),
    "mistral3": Chat(
        MISTRAL3_TEMPLATE,
        eos="</s>",
        pad="<pad>",
        image="[IMG]",
        bos="<s>",
        adds_bos=True,
        others=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG_BREAK]", "[IMG_END]"),
    ),
    "glm4v": Chat(
        GLM4V_TEMPLATE,
        eos="<|endoftext|>",
        pad="[MASK]",
        image="<|image|>",
        others=(
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>"),
            *("<|begin_of_video|>", "<|end_of_video|>", "<|video|>"),
        ),
    ),
    "aya_vision": Chat(
        AYA_TEMPLATE,
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        image="<|IMG_PATCH|>",
        bos="<BOS_TOKEN>",
        adds_bos=True,
        placeholder="<image>",
        others=(
            *("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
            *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
            *(f"TILE_{tile}" for tile in range(1, 13)),
        ),
    ),
}
