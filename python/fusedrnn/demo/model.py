# SPDX-License-Identifier: Apache-2.0
"""A character language model on NumPy arrays: embedding, recurrent layers, softmax."""

from typing import Any

import numpy as np

import fusedrnn

EMBEDDING = 64
Shapes = dict[str, tuple[int, ...]]
CELLS = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn": fusedrnn.RNN}


def shapes(characters: int, cell: str, hidden: int, layers: int) -> Shapes:
    """The shape of every parameter of a `CharacterModel`, without making one."""
    found: Shapes = {"embedding.weight": (characters, EMBEDDING)}
    found |= {"output.weight": (characters, hidden), "output.bias": (characters,)}
    of_layers = fusedrnn.params.shapes("rnn_tanh" if cell == "rnn" else cell, EMBEDDING, hidden, layers)
    return found | {f"layer.{name}": shape for name, shape in of_layers.items()}


class CharacterModel:
    """`parameters` are live arrays, named as torch.nn.Embedding, the recurrent layer and torch.nn.Linear name them."""

    def __init__(
        self, characters: int, cell: str, hidden: int, layers: int, seed: int, backend: str | None = None
    ) -> None:
        rng = np.random.default_rng([seed, 1])
        self.layer = CELLS[cell](EMBEDDING, hidden, layers, seed=seed, backend=backend)
        bound = hidden**-0.5
        self.embedding = rng.standard_normal((characters, EMBEDDING), np.float32)
        self.weight = rng.uniform(-bound, bound, (characters, hidden)).astype(np.float32)
        self.bias = np.zeros(characters, np.float32)
        self.parameters = {
            "embedding.weight": self.embedding,
            "output.weight": self.weight,
            "output.bias": self.bias,
            **{f"layer.{name}": array for name, array in self.layer.parameters.items()},
        }
        self.buffers: dict[str, np.ndarray] = {}

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids (T,B) -> x (T,B,E), valid until the next call."""
        x = self.buffer("x", ids.size, EMBEDDING)
        # mode="clip" lets take write straight into x; the ids are in range
        np.take(self.embedding, ids.reshape(-1), axis=0, out=x, mode="clip")
        return x.reshape(*ids.shape, EMBEDDING)

    def loss(self, y: np.ndarray, targets: np.ndarray) -> float:
        """Mean cross entropy of y (T,B,H) against targets (T,B), in nats; leaves the softmax in a buffer."""
        n = targets.size
        logits = self.buffer("logits", n, len(self.bias))
        np.matmul(y.reshape(n, -1), self.weight.T, out=logits)
        logits += self.bias
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(n), targets.reshape(-1)]
        np.exp(logits, out=logits)
        sums = logits @ np.ones(logits.shape[1], np.float32)
        total = np.log(sums, dtype=np.float64).sum() - chosen.sum(dtype=np.float64)
        logits *= (1 / sums)[:, None]
        return float(total / n)

    def loss_and_gradients(self, y: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
        """The loss, its gradient in y, and the output layer's gradients; the arrays are valid until the next call."""
        n = targets.size
        loss = self.loss(y, targets)
        dlogits = self.buffer("logits", n, len(self.bias))  # where `loss` left the softmax
        dlogits[np.arange(n), targets.reshape(-1)] -= 1
        dlogits *= 1 / n
        dy = np.matmul(dlogits, self.weight, out=self.buffer("dy", n, self.weight.shape[1]))
        dweight = np.matmul(dlogits.T, y.reshape(n, -1), out=self.buffer("dweight", *self.weight.shape))
        return loss, dy.reshape(y.shape), {"output.weight": dweight, "output.bias": np.ones(n, np.float32) @ dlogits}

    def embedding_gradient(self, ids: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """Rows of dx summed by character: one product with the one-hot matrix, several times faster than np.add.at."""
        n = ids.size
        hot = self.buffer("logits", n, len(self.bias))  # the softmax is no longer needed
        hot.fill(0)
        hot[np.arange(n), ids.reshape(-1)] = 1
        return np.matmul(hot.T, dx.reshape(n, -1), out=self.buffer("dembedding", *self.embedding.shape))

    def gradients(self, chunk: Any, ids: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of one chunk of `tbptt.chunks` and the gradients of all parameters."""
        loss, dy, grads = self.loss_and_gradients(chunk.y, targets)
        for name, gradient in chunk.backward(dy).items():
            if name == "x":
                grads["embedding.weight"] = self.embedding_gradient(ids, gradient)
            elif name != "state":
                grads[f"layer.{name}"] = gradient
        return loss, grads

    def sample(self, prompt: np.ndarray, length: int, temperature: float, seed: int) -> np.ndarray:
        """Write `length` characters after the prompt."""
        options: dict[str, Any] = {"embedding": self.embedding, "temperature": temperature, "seed": seed}
        written: np.ndarray = fusedrnn.generate(self.layer, self.weight, self.bias, prompt, length, **options)
        return written

    def buffer(self, name: str, rows: int, columns: int) -> np.ndarray:
        """The first `rows` rows of an array that is kept from call to call and grows when it must."""
        array = self.buffers.get(name)
        if array is None or len(array) < rows:
            array = self.buffers[name] = np.empty((rows, columns), np.float32)
        return array[:rows]
