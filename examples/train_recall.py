"""Train the small recall model that ships in ``examples/recall-tiny``.

The script makes the tokenizer and the data (see ``recall_task``), trains a small Llama from a
random start, saves it in the Hugging Face layout and measures it on fresh cases.  It needs
``torch``, ``transformers`` and ``tokenizers``, and no network.  The shipped model was made by::

    python examples/train_recall.py --out examples/recall-tiny --seed 1 --device cuda

Every training sequence is one ledger followed by many questions, so that each one teaches
many look-ups.  Ledgers start short; whenever the model answers most questions right, the
longest ledger grows, up to the full context.  The learning rate falls over the last steps.
"""

from __future__ import annotations

import argparse
import math
import random
import string
import time
from pathlib import Path

import torch
from recall_task import (
    ADJECTIVES,
    HEADER,
    NOUNS,
    SYSTEM_PROMPT,
    TOKENS_PER_FACT,
    Case,
    answer_text,
    ledger_text,
    make_cases,
    make_facts,
    question_text,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '</s>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CONTEXT = 2048
IGNORE = -100
EVAL_SEED_OFFSET = 1_000_003  # keeps evaluation cases apart from training ones


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer in which every key word and every digit is one token.

    All 256 byte symbols are in the vocabulary, so any text is encoded and decoded exactly.
    No special token is added on encoding: a prompt is its own text and nothing else.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+ ?|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    keys = [f"{a}-{n}: 0, " for a, n in zip(ADJECTIVES, NOUNS, strict=True)]
    frames = [HEADER, question_text(["x"]), question_text(["x", "x"]), SYSTEM_PROMPT]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        show_progress=False,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator((keys + frames) * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    for word in ADJECTIVES + NOUNS:
        if len(tokenizer.encode(word)) != 1:
            raise RuntimeError(f"{word!r} is not a single token")
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.05,
        attn_implementation="sdpa",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def random_text(rng: random.Random) -> str:
    """Return a short line of gibberish; it teaches the model to see past unrelated text."""
    return "".join(rng.choices(string.ascii_letters + "    ,.", k=rng.randint(1, 80)))


def make_sequence(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, n_facts: int, rounds: int
) -> tuple[list[int], list[int]]:
    """Make the token ids and labels of one ledger with ``rounds`` questions about it.

    Half of the sequences are in the completion format and half in the chat format.  Labels are
    set on the answers and the end-of-sequence token after each; nothing else is learnt.
    Half of the sequences open with a system message (chat) or a line of text (completion).
    """
    facts = make_facts(rng, n_facts)
    chat = rng.random() < 0.5
    head = ""
    if rng.random() < 0.5:
        head = SYSTEM_PROMPT if rng.random() < 0.3 else random_text(rng)
        head = f"<|system|>\n{head}{EOS}\n" if chat else f"{head}\n"
    texts = []
    for turn in range(rounds):
        n_asked = min(n_facts, rng.choice((1, 1, 1, 2, 3, 4, 6)))
        asked = [key for key, _ in rng.sample(facts, n_asked)]
        user = (ledger_text(facts) if turn == 0 else "") + question_text(asked)
        if chat:
            user = f"<|user|>\n{user.rstrip()}{EOS}\n<|assistant|>\n"
        elif rng.random() < 0.1:
            user = user.rstrip()  # a client may strip the prompt
        texts += [("\n" if turn else head) + user, answer_text(facts, asked) + EOS]
    ids: list[int] = []
    labels: list[int] = []
    for index, part in enumerate(tokenizer.backend_tokenizer.encode_batch(texts)):
        ids += part.ids
        labels += part.ids if index % 2 else [IGNORE] * len(part.ids)
    return ids[:CONTEXT], labels[:CONTEXT]


def make_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, max_facts: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch of about ``tokens`` tokens with ledgers of up to ``max_facts`` lines."""
    n_facts = rng.randint(2, max_facts)
    rounds = max(6, min(n_facts, 16))
    length = min(CONTEXT, n_facts * TOKENS_PER_FACT + rounds * 44)
    rows = [make_sequence(tokenizer, rng, n_facts, rounds) for _ in range(max(2, tokens // length))]
    width = max(len(ids) for ids, _ in rows)
    ids = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORE] * (width - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def answer_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits at every labelled token and the labels themselves."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORE
    return model.lm_head(hidden[wanted]), labels[:, 1:][wanted]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return the rate: linear warm-up, flat, then a cosine fall over the last 40 % of steps."""
    hold = int(0.6 * steps)
    if step < hold:
        return peak * min(1.0, (step + 1) / warmup)
    fall = (step - hold) / max(1, steps - hold)
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * fall)))


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> None:
    """Train the model in place, with a checkpoint every 200 steps."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    max_facts, right, started, seen = 8, 0.0, time.monotonic(), 0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        batch = make_batch(tokenizer, rng, max_facts, args.batch_tokens)
        ids, labels = (tensor.to(model.device) for tensor in batch)
        logits, wanted = answer_logits(model, ids, labels)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += ids.numel()
        batch_right = (logits.argmax(-1) == wanted).float().mean().item()
        right += 0.1 * (batch_right - right)
        if right > 0.93 and max_facts < args.max_facts:
            max_facts = min(args.max_facts, math.ceil(max_facts * 1.3))
            right = 0.8  # asks for a dozen good batches or more before the next growth
        if step % 20 == 0 or step == args.steps - 1:
            rate = seen / (time.monotonic() - started)
            print(
                f"step {step:5d}  facts<={max_facts:3d}  loss {loss.item():.4f}  "
                f"tokens right {batch_right:.4f}  {rate:,.0f} tok/s",
                flush=True,
            )
        if step and step % 200 == 0:
            save(model, tokenizer, args.out)


def answer_is_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, case: Case, chat: bool
) -> bool:
    """Tell whether greedy decoding gives exactly the case's answer and then stops.

    One pass over prompt and answer suffices: greedy decoding yields the answer if and only if
    each of its tokens is the likeliest one after those before it.
    """
    prompt = case.prompt
    if chat:
        prompt = tokenizer.apply_chat_template(
            case.messages(), tokenize=False, add_generation_prompt=True
        )
    before, after = tokenizer.encode(prompt), tokenizer.encode(case.answer + EOS)
    labels = torch.tensor([[IGNORE] * len(before) + after])
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logits, wanted = answer_logits(model, ids.to(model.device), labels.to(model.device))
    return bool((logits.argmax(-1) == wanted).all())


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int
) -> None:
    """Print the share of fresh cases answered exactly, by format and prompt length."""
    bounds = [(50, 300), (300, 600), (600, 900), (900, 1200), (1200, 1800)]
    for n_asked, chat in [(1, False), (1, True), (4, False), (4, True)]:
        shares = []
        for low, high in bounds:
            per_bound = max(1, count // len(bounds))
            cases = list(make_cases(seed + low, per_bound, low, high, n_asked))
            good = sum(answer_is_right(model, tokenizer, case, chat) for case in cases)
            shares.append(f"{low}-{high}: {good}/{len(cases)}")
        print(f"asked {n_asked}  {'chat ' if chat else 'plain'}  " + "  ".join(shares), flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model, generation settings and tokenizer to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Parse the options, then make, train, save and measure the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    parser.add_argument("--device", default="cpu", help="torch device to train on")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens in one step")
    parser.add_argument("--max-facts", type=int, default=165, help="lines of the longest ledger")
    parser.add_argument("--eval-cases", type=int, default=500, help="fresh cases per format")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).to(args.device)
    print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}", flush=True)
    train(model, tokenizer, args)
    save(model, tokenizer, args.out)
    model.eval()
    evaluate(model, tokenizer, args.seed + EVAL_SEED_OFFSET, args.eval_cases)


if __name__ == "__main__":
    main()
