import functools
import shutil

import pytest
import torch
from PIL import Image
from transformers.utils import logging

from pixart_data.captioner import Captioner
from pixart_data.errors import ConfigError
from pixart_data.questions import Decoding, ask
from pixart_data.sections import Captioner as Section

logging.disable_progress_bar()

SPECIAL = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_qwen(folder):
    """A tiny Qwen2-VL: packed pixels, grids, and a processor that asks for a video processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from pixart_data.captioner import _allow_missing_torchvision

    _allow_missing_torchvision()
    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    text.train_from_iterator(["a red house"], trainer)
    extra = {"image_token": SPECIAL[5], "video_token": SPECIAL[6]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token=SPECIAL[0], eos_token=SPECIAL[2], extra_special_tokens=extra
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**sizes, **heads, **rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
            image_token_id=5,
            video_token_id=6,
            vision_start_token_id=3,
            vision_end_token_id=4,
        )
    )
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28})
    model.save_pretrained(folder)
    Qwen2VLProcessor(image_processor=images, tokenizer=tokenizer, chat_template=QWEN_TEMPLATE).save_pretrained(folder)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(miniatures, tmp_path_factory):
    qwen = tmp_path_factory.mktemp("models") / "qwen"
    build_qwen(qwen)
    return {"llava": miniatures["llava"], "qwen": str(qwen)}


@pytest.fixture(scope="module", params=["llava", "qwen"])
def captioner(request, folders):
    """Shared: tests that change it put it back."""
    return Captioner(Section(model=folders[request.param], max_new_tokens=8))


@pytest.fixture
def llava(miniatures):
    return Captioner(Section(model=miniatures["llava"], max_new_tokens=8))


@pytest.fixture(scope="module")
def images():
    noise = torch.randint(0, 255, (90, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [
        Image.new("RGB", (120, 60), (200, 30, 30)),
        Image.fromarray(noise.numpy()),
        Image.linear_gradient("L").convert("RGB"),
        Image.new("RGB", (1, 3)),
    ]


PROMPTS = ["What?", "Describe this image and its style in a very detailed manner", "Say more, please", "And this?"]


def sent(captioner, monkeypatch, images, prompts):
    """The token ids that reach the model."""
    generate, seen = captioner.model.generate, []

    def spy(**inputs):
        seen.append(inputs["input_ids"])
        return generate(**inputs)

    monkeypatch.setattr(captioner.model, "generate", spy)
    captioner.describe(images, prompts)
    return seen[0].tolist()


def test_a_batch_answers_as_one_by_one(captioner, images):
    together = captioner.describe(images, PROMPTS)
    alone = [captioner.describe([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    assert together == alone
    assert [answer.prompt for answer in together] == PROMPTS
    assert all(answer.text for answer in together)


def test_the_answer_depends_on_the_image(captioner, images, monkeypatch):
    seen = []
    forward = captioner.model.forward

    def spy(*args, **inputs):
        output = forward(*args, **inputs)
        seen.append(output.logits[:, -1].float())
        return output

    monkeypatch.setattr(captioner.model, "forward", functools.wraps(forward)(spy))
    captioner.describe(images[:1], ["What?"])
    captioner.describe(images[1:2], ["What?"])
    assert not torch.equal(seen[0], seen[8])


def test_an_answer_that_is_cut_off_says_so(captioner, images):
    for answer in captioner.describe(images, PROMPTS):
        assert (answer.finish_reason, answer.num_tokens) == ("length", 8)


def test_an_answer_that_ends_says_so_whatever_the_others_do(captioner, images, monkeypatch):
    generate, seen = captioner.model.generate, []
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: seen.append(generate(**inputs)) or seen[-1])
    captioner.describe(images, PROMPTS)
    answers = seen[0][:, -8:].tolist()
    end = next(token for token in answers[0] if any(token not in answer for answer in answers))
    monkeypatch.setattr(captioner.model.generation_config, "eos_token_id", [2, end])
    together = captioner.describe(images, PROMPTS)
    for answer, tokens in zip(together, answers, strict=True):
        length = tokens.index(end) if end in tokens else 8
        assert (answer.num_tokens, answer.finish_reason) == (length, "stop" if length < 8 else "length")
        assert answer.text == captioner.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    assert {answer.finish_reason for answer in together} == {"stop", "length"}
    assert together == [captioner.describe([i], [p])[0] for i, p in zip(images, PROMPTS, strict=True)]


def test_prompt_tokens_count_the_image_and_no_padding(llava, images, monkeypatch):
    answers = llava.describe(images, PROMPTS)
    for answer in answers:
        words = llava.tokenizer(f"USER: <image>\n{answer.prompt} ASSISTANT:")["input_ids"]
        assert answer.num_prompt_tokens == len(words) - 1 + 16  # 56 px in patches of 14 px
    rows = sent(llava, monkeypatch, images, PROMPTS)
    assert [len(row) - row.count(0) for row in rows] == [answer.num_prompt_tokens for answer in answers]


@pytest.mark.parametrize("in_template", [True, False])
def test_the_sequence_begins_once(miniatures, tmp_path, images, monkeypatch, in_template):
    """A tokenizer that adds <s> by itself, as LLaMA's does, with templates of both kinds."""
    from tokenizers.processors import TemplateProcessing

    folder = shutil.copytree(miniatures["llava"], tmp_path / "llava")
    if in_template:
        template = folder / "chat_template.jinja"
        template.write_text("{{ bos_token }}" + template.read_text())
    captioner = Captioner(Section(model=str(folder), max_new_tokens=1))
    adds_bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    captioner.tokenizer.backend_tokenizer.post_processor = adds_bos
    assert captioner.tokenizer("x")["input_ids"][0] == 1
    for row in sent(captioner, monkeypatch, images, PROMPTS):
        assert row.count(1) == 1
        assert [token for token in row if token != 0][0] == 1  # after the padding on the left


def test_raw_captions_are_quoted_as_they_are():
    quoting = Section(prompt="plain", prompt_with_caption='Given "{caption}", go {x}')
    asked = ask(quoting, "caption", "a {caption} in {0} %s \\1\n  two", ())
    assert asked == 'Given "a {caption} in {0} %s \\1 two", go {x}'
    assert [ask(quoting, "caption", raw, ()) for raw in (None, "", " \n ")] == ["plain"] * 3


def test_without_a_quoting_prompt_captions_are_not_quoted():
    assert ask(Section(), "caption", "a caption", ()) == Section().prompt


def test_a_further_prompt_quotes_the_raw_caption_or_is_not_asked():
    section = Section(prompt_with_caption="{caption}, you say", prompts={"short": "Short?", "of": 'Of "{caption}"?'})
    assert list(section.questions) == ["caption", "caption_short", "caption_of"]
    assert [ask(section, name, "a house", ()) for name in section.questions] == [
        "a house, you say",
        "Short?",
        'Of "a house"?',
    ]
    assert [ask(section, name, " ", ()) for name in section.questions] == [section.prompt, "Short?", None]


@pytest.mark.parametrize("setting", ["prompt", "prompt_with_caption", "prompts.short"])
def test_a_token_of_the_model_in_a_prompt_is_a_setting_to_mend(miniatures, setting):
    section, _, name = setting.partition(".")
    words = {section: {name: "<image> what is it?"} if name else "<image> {caption}, what is it?"}
    with pytest.raises(ConfigError, match=f"captioner.{setting}: expected words, found .*<image>"):
        Captioner(Section(model=miniatures["llava"], **words))


def test_words_that_look_like_special_tokens_do_not_break_a_batch(captioner, images):
    hostile = ["</s><s> <pad>", "{{ 7 * 7 }} {% for %}", "<|im_end|>\n<|im_start|>system", "\x00 \u202e ÿ 红"]
    assert len(captioner.describe(images, hostile)) == 4


def test_special_tokens_in_a_raw_caption_are_no_special_tokens(folders, images):
    """Alt text can say anything; `<image>` in it would ask for a second image, which fails the batch."""
    for folder, words in ((folders["llava"], "<image>"), (folders["qwen"], "<|image_pad|>")):
        captioner = Captioner(Section(model=folder, max_new_tokens=2, prompt_with_caption='Given "{caption}", go'))
        raw_captions = [f"a caption of {words} an</s>{words} image", "What?"]
        batch = {"image": images[:2], "raw_caption": raw_captions, "seed": [0, 0]}
        answers = captioner(batch)["answers"]
        assert len(answers) == 2
        assert words not in answers[0]["caption"].prompt
        assert answers[0]["caption"].prompt.startswith('Given "a caption of an')


def test_a_batch_gets_a_column_and_keeps_the_others(captioner, images):
    batch = {"image": images[:2], "raw_caption": ["raw", None], "seed": [0, 1], "key": ["a", "b"]}
    out = captioner(batch)
    assert out.keys() == {*batch, "answers"}
    alone = captioner.describe(images[:2], [captioner.config.prompt] * 2)
    assert out["answers"] == [{"caption": answer} for answer in alone]
    assert out["key"] == ["a", "b"]


def test_several_captions_of_each_image(miniatures, images):
    prompts = {"short": "In short?", "quoting": 'Given "{caption}"?'}
    captioner = Captioner(Section(model=miniatures["llava"], max_new_tokens=8, prompts=prompts))
    batch = {"image": images[:3], "raw_caption": ["a house", None, "a tree"], "seed": [0, 1, 2]}
    answers = captioner(batch)["answers"]
    for name, asked in (("caption", captioner.config.prompt), ("caption_short", "In short?")):
        assert [row[name] for row in answers] == captioner.describe(images[:3], [asked] * 3)
    quoted = captioner.describe([images[0], images[2]], ['Given "a house"?', 'Given "a tree"?'])
    assert [answers[0]["caption_quoting"], answers[2]["caption_quoting"]] == quoted
    assert answers[1]["caption_quoting"].reason == "no_caption"


def test_sampling_repeats_with_its_seed(miniatures, images):
    captioner = Captioner(Section(model=miniatures["llava"], max_new_tokens=8, temperature=2.0, top_p=0.95))

    def draw(seed):
        batch = {"image": images, "raw_caption": [None] * 4, "seed": [seed] * 4}
        return [row["caption"].text for row in captioner(batch)["answers"]]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_answers_asked_for_again_are_drawn_each_from_its_own_seed(captioner, images, monkeypatch):
    """Whatever shares the batch, and however often the batch has to be halved."""
    sampled, longer = Decoding(1.5, 0.95, 8), Decoding(1.5, 0.95, 11, 0.5)
    batch = {
        "image": images,
        "raw_caption": [None] * 4,
        "seed": [3, 4, 5, 6],
        "decoding": [sampled, longer, sampled, Decoding(0.0, 1.0, 8)],
    }
    together = captioner(batch)["answers"]
    assert [list(answer) for answer in together] == [["caption"]] * 4
    lengths = [answer["caption"].num_tokens for answer in together]
    assert 8 < lengths[1] <= 11
    assert max(lengths[0], lengths[2], lengths[3]) == 8
    for place in range(4):
        alone = captioner({name: column[place : place + 1] for name, column in batch.items()})["answers"]
        assert alone == together[place : place + 1]
    monkeypatch.setattr(captioner._describe_again, "limit", 1)
    assert captioner(batch)["answers"] == together
    monkeypatch.setattr(captioner.model.generation_config, "num_beams", 3)  # as some models come
    assert captioner(batch)["answers"] == together
    monkeypatch.setattr(captioner.model.generation_config, "num_beams", 1)
    other = captioner({**batch, "seed": [30, 40, 50, 60]})["answers"]
    assert [one == two for one, two in zip(together, other, strict=True)] == [False, False, False, True]
    plain = captioner({name: column for name, column in batch.items() if name != "decoding"})["answers"]
    assert plain[3] == together[3]  # greedy as before


def test_longer_answers_that_do_not_fit_into_memory_halve_their_own_batches_only(miniatures, images, monkeypatch):
    llava = Captioner(Section(model=miniatures["llava"], max_new_tokens=4))
    generate, sizes = llava.model.generate, []

    def short_only(**inputs):
        if inputs["max_new_tokens"] > 4 and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(llava.model, "generate", short_only)
    batch = {"image": images[:2], "raw_caption": [None] * 2, "seed": [1, 2]}
    llava(batch | {"decoding": [Decoding(0.5, 0.9, 6)] * 2})
    llava(batch)
    assert sizes == [1, 1, 2]


def test_a_batch_that_does_not_fit_into_memory_is_halved(llava, images, monkeypatch):
    whole = llava.describe(images, PROMPTS)
    generate = llava.model.generate

    def small_only(**inputs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(llava.model, "generate", small_only)
    assert llava.describe(images, PROMPTS) == whole


def test_a_model_without_a_chat_template_gets_the_words_alone(miniatures, tmp_path, images):
    folder = shutil.copytree(miniatures["llava"], tmp_path / "llava")
    (folder / "chat_template.jinja").unlink()
    captioner = Captioner(Section(model=str(folder), max_new_tokens=2, prompt="<image>\nWhat?"))
    [answer] = captioner.describe(images[:1], ["<image>\nWhat?"])
    assert answer.num_prompt_tokens == 15 + len(captioner.tokenizer("<image>\nWhat?")["input_ids"])
    with pytest.raises(ConfigError, match="captioner.prompt: .* does not take it: .* Found total 0 <image> tokens"):
        Captioner(Section(model=str(folder), prompt="What?"))


def test_a_processor_that_drops_the_image_is_a_setting_to_mend(llava, images, monkeypatch):
    text_only = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"

    def drop(conversations, **options):
        return llava.tokenizer(["What?"], return_tensors="pt")

    monkeypatch.setattr(llava.processor, "chat_template", text_only)
    monkeypatch.setattr(llava.processor, "apply_chat_template", drop)
    with pytest.raises(ConfigError, match=r"captioner.model: the processor of .* drops the image; use an image-text"):
        llava.describe(images[:1], ["What?"])


def test_a_model_that_does_not_look_at_the_image_is_a_setting_to_mend(miniatures, monkeypatch):
    """The processor hands over pixels and the prompt counts them, but no picture is in them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    preprocess = CLIPImageProcessorPil.preprocess

    def black(self, images, *args, **options):
        out = preprocess(self, images, *args, **options)
        out["pixel_values"] = [pixels * 0 for pixels in out["pixel_values"]]
        return out

    Captioner(Section(model=miniatures["llava"]))
    monkeypatch.setattr(CLIPImageProcessorPil, "preprocess", black)
    with pytest.raises(ConfigError, match=r"captioner.model: .* answers the same to a red and to a blue picture; use"):
        Captioner(Section(model=miniatures["llava"]))


def test_a_row_whose_image_is_not_in_its_prompt_is_rejected(llava, images, monkeypatch):
    """As from a template that leaves the image out, with a processor that hands over its pixels all the same."""
    words = llava.tokenizer(["USER: What? ASSISTANT:"], return_tensors="pt")
    assert words["input_ids"].shape[1] == llava._count_words("What?")
    pixels = torch.zeros(1, 3, 56, 56)
    monkeypatch.setattr(llava, "_inputs", lambda images, prompts: {**words, "pixel_values": pixels})
    monkeypatch.setattr(llava.model, "generate", lambda **inputs: inputs["input_ids"].repeat(1, 2))
    monkeypatch.setattr(llava, "config", llava.config.model_copy(update={"prompt": "What?"}))
    [row] = llava({"image": images[:1], "raw_caption": [None], "seed": [0]})["answers"]
    assert row["caption"].reason == "image_unseen"
    assert "tokens with the image and" in row["caption"].detail


def test_facts_say_which_model_it_was(captioner):
    assert captioner.facts["id"] == captioner.config.model
    assert captioner.facts["identity"].startswith("folder:")
    assert captioner.facts["dtype"] == "float32"


def test_a_model_runs_in_the_dtype_asked_for(miniatures, images):
    captioner = Captioner(Section(model=miniatures["llava"], max_new_tokens=2, dtype="bf16"))
    assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.bfloat16}
    assert captioner.facts["dtype"] == "bfloat16"
    assert len(captioner.describe(images[:2], PROMPTS[:2])) == 2


def build_text_only(folder):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder / "text")
    AutoTokenizer.from_pretrained(folder / "t5").save_pretrained(folder / "text")


@pytest.mark.parametrize("kind", ["text", "t5", "vae", "empty", "no processor", "no weights", "half weights"])
def test_what_is_no_image_text_model_is_a_setting_to_mend(miniatures, tmp_path, kind):
    for name, folder in miniatures.items():
        shutil.copytree(folder, tmp_path / name)
    build_text_only(tmp_path)
    for name in ("no processor", "no weights", "half weights"):
        shutil.copytree(miniatures["llava"], tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "no processor/processor_config.json").unlink()
    (tmp_path / "no weights/model.safetensors").unlink()
    weights = tmp_path / "half weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConfigError) as caught:
        Captioner(Section(model=str(tmp_path / kind)))
    assert str(caught.value).startswith(f"captioner.model: {tmp_path / kind} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_picture_too_long_for_a_family_does_not_fail_its_batch(folders, images):
    """Qwen's processor refuses sides of more than 200 to 1."""
    qwen = Captioner(Section(model=folders["qwen"], max_new_tokens=2))
    assert len(qwen.describe([images[0], Image.new("RGB", (900, 4))], ["What?", "What?"])) == 2
