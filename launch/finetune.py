"""Fine-tune a Hugging Face model on long text: an ordinary script, in which ringattn shards the attention over ranks.

    python launch/finetune.py                                           one rank, a small Llama with random weights
    torchrun --nproc-per-node 4 launch/finetune.py --length 8192        four ranks share each sample of 8,192 bytes
    torchrun --nproc-per-node 2 launch/finetune.py --model my-model --save my-model-long

The README shows what differs from the script that trains on one rank: five lines, and their imports.
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ringattn
from ringattn.integrations.huggingface import attach
from ringattn.rendezvous import Launch
from ringattn.trainer.data import Corpus, read_corpus
from ringattn.training import sum_gradients, total

SMALL = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=131072, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a model of at least 256 words (default: a small Llama)")
    parser.add_argument("--length", type=int, default=2048, help="bytes of a sample (default 2048)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 0.001)")
    parser.add_argument("--save", help="folder for the trained model")
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    mesh = ringattn.init()
    torch.manual_seed(0)  # the same weights on every rank
    if given.model:
        model = AutoModelForCausalLM.from_pretrained(given.model)
    else:
        model = AutoModelForCausalLM.from_config(SMALL)
    attached = attach(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    corpus = Corpus(read_corpus(None)[0], seed=0)  # the source of Python's standard library
    rank = Launch.found(os.environ).rank

    for step in range(given.steps):
        ids = corpus.pack(step, given.length).tokens
        loss = model(**attached.batch(ids, labels=ids)).loss
        loss.backward()
        sum_gradients(model, mesh)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = total(loss, mesh)
        if rank == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.7f}", flush=True)

    if given.save and rank == 0:
        model.save_pretrained(given.save)


if __name__ == "__main__":
    main(options())
