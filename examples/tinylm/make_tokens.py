"""Make the tokenizer and the token files of the tiny model from a folder that holds WikiText-2 as text.

    python examples/tinylm/make_tokens.py TEXT_DIR OUT_DIR

TEXT_DIR holds train.txt, valid.txt and test.txt of WikiText-2 (v1, with <unk>); SOURCES.md says where they
come from. Nothing is downloaded. OUT_DIR gets tokenizer.json, {train,valid,test}_tokens.npy, and
calib_tokens.npy. A tokenizer.json that stands in OUT_DIR already is used as it is. Needs the `tokenizers`
package.
"""

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
CALIBRATION = (64, 512)


def train_tokenizer(text: Path) -> Tokenizer:
    """A byte-level BPE: every text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    return tokenizer


def calibration_windows(tokens: np.ndarray) -> np.ndarray:
    """Windows at random places of the train text, [64, 512]; seeded, so that they are always the same."""
    count, length = CALIBRATION
    starts = np.random.default_rng(0).integers(0, len(tokens) - length // 2, count)
    return np.stack([tokens[start : start + length] for start in starts])


def main() -> None:
    """Read the texts, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "tokenizer.json"
    if not file.exists():
        train_tokenizer(args.texts / "train.txt").save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    for split in ("train", "valid", "test"):
        text = (args.texts / f"{split}.txt").read_text(encoding="utf8")
        tokens = np.asarray(tokenizer.encode(text).ids, np.uint16)
        if tokenizer.decode(tokens, skip_special_tokens=False) != text:
            raise SystemExit(f"{split}.txt does not survive encoding and decoding; is tokenizer.json its own?")
        np.save(args.out / f"{split}_tokens.npy", tokens)
        if split == "train":
            np.save(args.out / "calib_tokens.npy", calibration_windows(tokens))
        print(f"{split}: {len(tokens)} tokens, {len(text.encode()) / len(tokens):.3f} bytes a token")


if __name__ == "__main__":
    main()
