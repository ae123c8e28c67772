"""Make the two models of the demo: a teacher that can add, and a student that has parts of its table wrong.

Both are small character-level Llama models. A problem is a ``chain_sum`` expression of reasoning-gym with six
one-digit terms, and its solution is the five running sums:

    4 + 1 + 7 - 7 + 7 - 6   ->   5 12 5 12 6

The teacher learns right solutions, from nothing. The student is the teacher, trained further on solutions of somebody
who has misremembered about a third of the 200 facts "a sum that ends in a, plus or minus b": each of these facts has
one wrong result, off by 1 to 3, which is given nine times in ten. The sums after it continue from the wrong value. So
the student knows the form of a solution and most of the facts, but its most likely answer to the others is wrong: no
sharper sampling helps it, it has to learn each of them.

Problems are drawn as reasoning-gym draws them (digits and signs uniform) but by another generator, and every
expression that reasoning-gym makes from ``RESERVED_SEEDS`` is left out of the training of both models. reasoning-gym
seeds item ``i`` of a data set with ``seed + i``, so a data set whose ``seed .. seed + size - 1`` lies in there holds
nothing that a model was trained on here.

    python examples/chain_sum/make_models.py --out examples/chain_sum/models
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TERMS = 6
RESERVED_SEEDS = range(0, 20_000)
"""Seeds of reasoning-gym items kept out of training: on-policy prompts and held-out problems come from these."""

SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHARACTERS = "0123456789+- "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_NEW_TOKENS = 24  # the longest right solution, -9 -18 -27 -36 -45, has 18 characters and <eos>


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id a character, four special tokens, and the chat template; no unknown token: other text fails."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # has no id: other text raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def keys(digits: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """One integer for each problem: digits [N, TERMS], signs [N, TERMS - 1] of 0 or 1 -> [N]."""
    return digits @ 10 ** np.arange(TERMS) + 10**TERMS * (signs @ 2 ** np.arange(TERMS - 1))


def reserved_keys() -> np.ndarray:
    data = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=TERMS,
        max_terms=TERMS,
        min_digits=1,
        max_digits=1,
        seed=RESERVED_SEEDS.start,
        size=len(RESERVED_SEEDS),
    )
    parts = [entry["metadata"]["expression"].split() for entry in data]
    digits = np.array([[int(digit) for digit in part[::2]] for part in parts])
    signs = np.array([[sign == "-" for sign in part[1::2]] for part in parts]).astype(int)
    return keys(digits, signs)


def draw_problems(rng: np.random.Generator, count: int, reserved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """digits [count, TERMS] in 0..9 and signs [count, TERMS - 1] of 0 or 1 (minus), none of them reserved."""
    drawn = count + count // 8 + 8  # one problem in some 1,600 is reserved
    digits = rng.integers(0, 10, (drawn, TERMS))
    signs = rng.integers(0, 2, (drawn, TERMS - 1))
    free = np.flatnonzero(~np.isin(keys(digits, signs), reserved))[:count]
    return digits[free], signs[free]


def misremember(rng: np.random.Generator, share: float) -> np.ndarray:
    """How far off each fact is, [last digit of the sum, sign, digit]: 0, or 1 to 3 either way for `share` of them."""
    offsets = rng.choice([-3, -2, -1, 1, 2, 3], (10, 2, 10))
    return np.where(rng.permutation(200).reshape(10, 2, 10) < round(200 * share), offsets, 0)


def solve(
    digits: np.ndarray, signs: np.ndarray, offsets: np.ndarray, slip: float, rng: np.random.Generator
) -> np.ndarray:
    """Running sums [N, TERMS - 1]; a fact with an offset is got wrong by it with probability `slip`."""
    total, sums = digits[:, 0], []
    for sign, digit in zip(signs.T, digits[:, 1:].T, strict=True):
        slipped = rng.random(len(total)) < slip
        total = total + np.where(sign == 1, -digit, digit) + offsets[total % 10, sign, digit] * slipped
        sums.append(total)
    return np.stack(sums, axis=1)


def make_batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    count: int,
    reserved: np.ndarray,
    offsets: np.ndarray,
    slip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """token ids [N, L] and labels [N, L], where every place but those of the answer is -100."""
    digits, signs = draw_problems(rng, count, reserved)
    sums = solve(digits, signs, offsets, slip, rng)
    chats = []
    for row, sign, answer in zip(digits.tolist(), signs.tolist(), sums.tolist(), strict=True):
        rest = "".join(f" {'+-'[minus]} {digit}" for minus, digit in zip(sign, row[1:], strict=True))
        question = {"role": "user", "content": f"{row[0]}{rest}"}
        chats.append([question, {"role": "assistant", "content": " ".join(map(str, answer))}])
    prompt_length = len(tokenizer.apply_chat_template(chats[0][:1], add_generation_prompt=True)["input_ids"])
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    labels[:, :prompt_length] = -100  # all prompts have the same length
    return ids, labels


def train(
    model: LlamaForCausalLM,
    batches: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    lr: float,
    name: str,
) -> None:
    """Warm-up of 50 steps, linear decay to zero over the last half; prints a line every 50 steps.

    Muon at `lr` for the matrices of the layers, AdamW at a seventh of it for the embedding and the norms: on this
    task AdamW alone needs several times the steps (loss after 350 steps 0.57 against 0.08 nats a token).
    """
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    rest = [weight for weight in model.parameters() if not any(weight is layer for layer in layers)]
    optimizers = [
        torch.optim.Muon(layers, lr=lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=lr / 7, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(part, lambda s: min(1, (s + 1) / 50, (steps - s) / (steps / 2)))
        for part in optimizers
    ]
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids, labels = batches()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in [*optimizers, *schedules]:
            part.step()
        if step % 50 == 0 or step == steps:
            elapsed = time.perf_counter() - started
            print(f"{name} step {step}/{steps} loss {loss.item():.4f} nats/token {elapsed:.0f} s", flush=True)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """A float16 checkpoint; the model in memory keeps its float32 weights."""
    model.generation_config.do_sample = True
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    copy.deepcopy(model).half().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)  # a new one: a used one would carry its last padding along
    print(f"saved {folder} ({sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.2f} MB)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets teacher/ and student/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number may round differently")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=384)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128, help="problems a step")
    parser.add_argument("--teacher-steps", type=int, default=700)
    parser.add_argument("--teacher-lr", type=float, default=0.02)
    parser.add_argument("--student-steps", type=int, default=200)
    parser.add_argument("--student-lr", type=float, default=0.01)
    parser.add_argument("--share", type=float, default=0.35, help="share of the facts that the student has wrong")
    parser.add_argument("--slip", type=float, default=0.9, help="how often a fact that it has wrong comes out wrong")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    draw = partial(make_batch, tokenizer, rng, args.batch, reserved_keys())
    offsets = misremember(rng, args.share)
    train(model, partial(draw, offsets, 0.0), args.teacher_steps, args.teacher_lr, "teacher")
    save(model, args.out / "teacher")
    train(model, partial(draw, offsets, args.slip), args.student_steps, args.student_lr, "student")
    save(model, args.out / "student")


if __name__ == "__main__":
    main()
