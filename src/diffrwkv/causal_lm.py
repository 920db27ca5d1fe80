"""A causal language model of Hugging Face as a judge of texts: needs torch and transformers, `diffrwkv[judge]`."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffrwkv import bars
from diffrwkv.config import UserError
from diffrwkv.run import MOST_LOGITS
from diffrwkv.scoring import windows_of

PROBE = 8  # tokens that two texts share where it is tried whether a model sees what comes later


class Judged(NamedTuple):
    """What a causal model makes of a text: -log p, over so many of its tokens, of so many characters."""

    nats: float
    tokens: int
    characters: int


class CausalLM:
    """A model and its tokenizer; see `judging.Judge`.

    A text is tokenized without specials and stands behind BOS (EOS where the tokenizer has no BOS), which is given. A
    tokenizer with neither leaves the first token of a text uncounted.
    """

    given = 1

    def __init__(self, name: str):
        """Loads a model by its name on the hub, or from a folder. Raises UserError, also where it is not causal."""
        self.name = f"hf:{name}"
        try:
            import torch
            import transformers
        except ImportError:
            raise UserError(f"{self.name} needs torch and transformers: pip install 'diffrwkv[judge]'.") from None
        self._torch = torch
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"{self.name} cannot be loaded as a causal language model ({reason}).") from None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.float().eval().to(self._device)
        self._begin = self._tokenizer.bos_token_id
        if self._begin is None:
            self._begin = self._tokenizer.eos_token_id
        self._vocab_size = int(model.config.vocab_size)
        if not self._is_causal():
            raise UserError(
                f"{self.name} sees what comes later in a text: a judge must be a causal language model, such as "
                "hf:gpt2-large."
            )
        positions = getattr(model.config, "max_position_embeddings", None)
        self.length = min(positions or 1024, getattr(self._tokenizer, "model_max_length", None) or 1024)
        self.longest = positions
        self.features_are = f"the last hidden state of {self.name} at the last token of a text's first window"

    @property
    def weights(self) -> str:
        """A hash of the weights: the hub's commit, or of their bytes."""
        commit = getattr(self._model.config, "_commit_hash", None)
        if commit is not None:
            return commit
        digest = hashlib.sha256()
        for name, value in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without specials."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)

    def judged(
        self, texts: Sequence[str], *, window: int, stride: int, batch_size: int, progress: bool = False
    ) -> list[Judged]:
        """-log p of each text, each of its tokens counted once; see `judging.Judge`."""
        encoded = [self._given(self.encode(text)) for text in texts]
        rows, nats = [], np.zeros(len(texts))
        for i, ids in enumerate(encoded):
            for known, start, stop in windows_of(1, len(ids) - 1, window, window - stride):
                rows.append((i, known, ids[1 + start - known : 1 + stop]))
        rows.sort(key=lambda row: len(row[2]))
        bar = bars.bar(len(rows), "judge", show=progress)
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            of_tokens = self._nats([ids for *_, ids in batch])
            for (i, known, ids), row in zip(batch, of_tokens, strict=True):
                nats[i] += row[known - 1 : len(ids) - 1].sum(dtype=np.float64)
            bar.update(len(batch))
        bar.close()
        results = []
        for text, ids, n in zip(texts, encoded, nats.tolist(), strict=True):
            uncounted = len(self._tokenizer.decode(ids[:1].tolist())) if self._begin is None else 0
            results.append(Judged(n, len(ids) - 1, max(0, len(text) - uncounted)))
        return results

    def features(self, texts: Sequence[str], *, window: int, batch_size: int) -> np.ndarray:
        """float32 [N, D]: the last hidden state at the last of a text's first `window` tokens (arXiv 2102.01454)."""
        out = []
        for first in range(0, len(texts), batch_size):
            rows = [self.encode(text)[:window] for text in texts[first : first + batch_size]]
            hidden = self._run(rows, output_hidden_states=True).hidden_states[-1].float().cpu().numpy()
            out += [states[len(ids) - 1] for states, ids in zip(hidden, rows, strict=True)]
        return np.stack(out).astype(np.float32)

    def _given(self, ids: np.ndarray) -> np.ndarray:
        return ids if self._begin is None else np.concatenate([[self._begin], ids]).astype(np.int32)

    def _run(self, rows: Sequence[np.ndarray], **options: Any) -> Any:
        """What the model makes of rows of ids, padded on the right."""
        width = max(map(len, rows))
        if len(rows) * width * self._vocab_size > MOST_LOGITS:
            raise UserError(f"--batch_size: {len(rows)} rows of {width} tokens are too large for {self.name}.")
        ids, real = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)], real[i, : len(row)] = row, 1
        given = {"input_ids": ids, "attention_mask": real}
        with self._torch.inference_mode():
            arrays = {key: self._torch.from_numpy(x).to(self._device) for key, x in given.items()}
            return self._model(**arrays, **options)

    def _nats(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, L - 1]: -log p of each token behind the first, from those before it."""
        logits = self._run(rows).logits.float()[:, :-1]
        targets = np.zeros(logits.shape[:2], np.int64)
        for i, row in enumerate(rows):
            targets[i, : len(row) - 1] = row[1:]
        targets = self._torch.from_numpy(targets).to(self._device)
        with self._torch.inference_mode():
            nats = self._torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return nats.cpu().numpy()

    def _is_causal(self) -> bool:
        """Whether the logits at the tokens that two texts share are the same, whatever follows."""
        shared = np.arange(PROBE) % self._vocab_size
        rows = [np.concatenate([shared, np.full(PROBE, i % self._vocab_size)]) for i in (1, 2)]
        first, second = self._run(rows).logits.float()[:, :PROBE].cpu().numpy()
        return bool(np.abs(first - second).max() <= 1e-3 * np.abs(first).max())
