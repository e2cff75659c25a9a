# SPDX-License-Identifier: Apache-2.0
"""The libraries that are measured, ours among them. Each runs in its own process (see worker.py), which is started with
the environment that `environment` gives, held to that many cores, and imports only that library.

A rival builds a function without arguments from a workload's data: what is timed is a call of that function. All get
the same weights and time-major inputs, and each is called the way that costs it least: inputs are in its own arrays and
layout beforehand, weights are constants where it can prepare them once, outputs are its own and are not converted.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .workloads import BOTH, GATES, PASSES, Answers, Data, Workload

Run = Callable[[], Any]


def environment(threads: int) -> dict[str, str]:
    """What the libraries read before they start threads."""
    n = str(threads)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC")
    pool = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} intra_op_parallelism_threads={n}"
    return dict.fromkeys(names, n) | {"XLA_FLAGS": pool, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class Rival:
    """What all have in common: `title` for tables, the module it needs, and what it cannot do."""

    title = ""
    module = ""
    does: tuple[str, ...] = ("infer",)  # of workloads.PASSES
    compiles = False  # at its first call with a new size
    spins = 0.01  # seconds for which its threads keep cores busy after a call

    def __init__(self, threads: int) -> None:
        raise NotImplementedError

    @classmethod
    def version(cls) -> str | None:
        """None where it is not installed."""
        if importlib.util.find_spec(cls.module) is None:
            return None
        return importlib.metadata.version(cls.module)

    @classmethod
    def takes(cls, w: Workload) -> Workload:
        """What it runs in place of a workload: the same, but for those who show what a part of it costs."""
        return w

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        """Why it is not measured on this workload, or None."""
        if which not in cls.does:
            return "inference only" if cls.does == ("infer",) else "torch only"
        if w.E > 1 and which == "hvp":
            return "one model only"
        return "torch only" if (w.E > 1 or w.module == "cell") and "hvp" not in cls.does else None

    def build(self, data: Data, which: str) -> Run:
        raise NotImplementedError

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        """What a run returned, under the names of workloads.Answers."""
        raise NotImplementedError


class FusedRNN(Rival):
    """This package, through its layer objects."""

    title = "fusedrnn"
    module = "fusedrnn"
    does: tuple[str, ...] = BOTH
    backend: str | None = None  # the best there is
    recompute = False
    bfloat16 = False  # the weights' storage

    def __init__(self, threads: int) -> None:
        import fusedrnn

        fusedrnn.set_num_threads(threads)
        if self.backend is not None:
            fusedrnn.set_backend(self.backend)
        self.fusedrnn = fusedrnn

    @classmethod
    def version(cls) -> str | None:
        import fusedrnn

        missing = cls.backend is not None and fusedrnn.backends.missing(cls.backend) is not None
        return None if missing else str(fusedrnn.__version__)

    def build(self, data: Data, which: str) -> Run:
        w = data.workload
        layer = getattr(self.fusedrnn, w.cell.upper())(w.I, w.H, w.L, bidirectional=w.D == 2, recompute=self.recompute)
        layer.load_state_dict(data.params)
        if self.bfloat16:
            layer.parameters = self.fusedrnn.params.to_bfloat16(layer.parameters)
        options = {"lengths": data.lengths, "reset": data.reset}
        options = {name: value for name, value in options.items() if value is not None}
        x, dy = data.x, data.dy
        if which == "infer":
            layer.eval()
            return lambda: layer(x, **options)[0]
        layer.train()

        def step() -> Any:
            y, _ = layer(x, **options)
            return y, layer.backward(dy)

        return step

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        return {"y": result} if which == "infer" else {"y": result[0]} | result[1]


class FusedRNNRecompute(FusedRNN):
    """This package, rebuilding the gates in backward instead of keeping them."""

    title = "fusedrnn recompute"
    recompute = True


class FusedRNNBfloat16(FusedRNN):
    """This package with weights stored as bfloat16, on a workload whose weights lose nothing by it."""

    title = "fusedrnn bf16"
    bfloat16 = True
    does = ("infer",)

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        return super().refuses(w, which) if w.bf16 else "weights are not bfloat16's"


class FusedRNNNumba(FusedRNN):
    """This package's fallback."""

    title = "fusedrnn numba"
    backend = "numba"
    compiles = True


class Torch(Rival):
    """torch.nn in eager mode. It has no resets and no models side by side: loops, over its cell and over the models."""

    title = "torch"
    module = "torch"
    does = PASSES

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self.torch = torch
        self.modules: Any = torch.nn

    def build(self, data: Data, which: str) -> Run:
        torch = self.torch
        params = {name: torch.from_numpy(value) for name, value in data.params.items()}
        x, dy = torch.from_numpy(data.x), torch.from_numpy(data.dy)
        dy = dy[0] if data.workload.module == "cell" else dy
        names, weights, forward = self.forward(data, params, x)
        if which == "infer":

            def infer() -> Any:
                with torch.inference_mode():
                    return forward()

            return infer
        if which == "grad":
            return forward
        if which == "hvp":
            v = [torch.from_numpy(data.v[name]) for name in names]

            def product() -> Any:
                loss = (forward().square() * dy).sum() / 2
                first = torch.autograd.grad(loss, weights, create_graph=True)
                return names, torch.autograd.grad(first, weights, v)

            return product
        x.requires_grad_(True)
        dys = dy if len(names) == len(weights) else list(dy)  # y is a list where models loop

        def step() -> Any:
            y = forward()
            return y, names, torch.autograd.grad(y, [x, *weights], dys)

        return step

    def forward(self, data: Data, params: dict[str, Any], x: Any) -> tuple[list[str], list[Any], Callable[[], Any]]:
        """Parameters' names, the parameters (with E models: all of the first, all of the second ...), and a function
        that gives y, or a list of y."""
        w = data.workload
        if w.E > 1:
            models = [self.layer(w, {name: value[e] for name, value in params.items()}) for e in range(w.E)]
            names, weights = list(params), [p for model in models for p in model.parameters()]
            return names, weights, lambda: [model(x)[0] for model in models]
        if w.module == "cell" or data.reset is not None:
            return self.cell(data, params, x)
        model = self.layer(w, params)
        return list(params), list(model.parameters()), self.call(model, data, x)

    def layer(self, w: Workload, params: dict[str, Any]) -> Any:
        model = getattr(self.modules, w.cell.upper())(w.I, w.H, w.L, bidirectional=w.D == 2)
        model.load_state_dict(params)
        return model

    def call(self, model: Any, data: Data, x: Any) -> Callable[[], Any]:
        """A layer on all steps."""
        if data.lengths is None:
            return lambda: model(x)[0]
        rnn, lengths = self.torch.nn.utils.rnn, self.torch.from_numpy(data.lengths)

        def packed() -> Any:
            given = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return rnn.pad_packed_sequence(model(given)[0], total_length=data.workload.T)[0]

        return packed

    def cell(self, data: Data, params: dict[str, Any], x: Any) -> tuple[list[str], list[Any], Callable[[], Any]]:
        """A cell, step by step."""
        torch, w = self.torch, data.workload
        model = getattr(self.modules, w.cell.upper() + "Cell")(w.I, w.H)
        model.load_state_dict({name.removesuffix("_l0"): value for name, value in params.items()})
        h = torch.zeros(w.B, w.H)
        initial = (h, h.clone()) if w.cell == "lstm" else h
        keep: Any = None
        if data.reset is not None:
            keep = torch.from_numpy(1 - data.reset.astype(np.float32))[..., None]

        def loop() -> Any:
            state = initial
            y = []
            for t in range(w.T):
                if keep is not None and t:
                    state = tuple(s * keep[t] for s in state) if w.cell == "lstm" else state * keep[t]
                state = model(x[t], state)
                y.append(state[0] if w.cell == "lstm" else state)
            return torch.stack(y)

        def one() -> Any:
            state = model(x[0], initial)
            return state[0] if w.cell == "lstm" else state

        return list(params), list(model.parameters()), loop if w.T > 1 else one

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        if which in ("infer", "grad"):
            return {"y": self.stacked(data, result)}
        if which == "hvp":
            names, products = result
            return {name: product.numpy() for name, product in zip(names, products, strict=True)}
        y, names, (dx, *grads) = result
        found = {"y": self.stacked(data, y), "x": dx.numpy()}
        for n, name in enumerate(names):
            each = [grad.numpy() for grad in grads[n :: len(names)]]
            found[name] = np.stack(each) if len(each) > 1 else each[0]
        return found

    def stacked(self, data: Data, y: Any) -> np.ndarray:
        whole = self.torch.stack(y) if isinstance(y, list) else y
        found: np.ndarray = whole.detach().numpy().reshape(data.dy.shape)
        return found


class FusedTorch(Torch):
    """This package's modules for torch, in eager mode: lengths and resets by keyword, models side by side by vmap."""

    title = "fusedrnn.torch"

    @classmethod
    def version(cls) -> str | None:
        return None if super().version() is None else FusedRNN.version()

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import fusedrnn.torch

        fusedrnn.set_num_threads(threads)
        self.modules = fusedrnn.torch

    def forward(self, data: Data, params: dict[str, Any], x: Any) -> tuple[list[str], list[Any], Callable[[], Any]]:
        w = data.workload
        if w.E > 1:
            model = self.layer(w, {name: value[0] for name, value in params.items()})
            stacked = {name: value.clone().requires_grad_() for name, value in params.items()}
            call, vmap = self.torch.func.functional_call, self.torch.vmap

            def ensemble() -> Any:
                return vmap(lambda one: call(model, one, (x,))[0])(stacked)

            return list(stacked), list(stacked.values()), ensemble
        if w.module == "cell":
            return self.cell(data, params, x)
        model = self.layer(w, params)
        return list(params), list(model.parameters()), self.call(model, data, x)

    def call(self, model: Any, data: Data, x: Any) -> Callable[[], Any]:
        given = {"lengths": data.lengths, "reset": data.reset}
        options = {name: self.torch.from_numpy(value) for name, value in given.items() if value is not None}
        return lambda: model(x, **options)[0]


class FusedTorchPacked(FusedTorch):
    """The same with a PackedSequence, made and undone in the time that is taken, as torch.nn has it."""

    title = "fusedrnn.torch packed"
    call = Torch.call

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        return super().refuses(w, which) if w.lengths < 1 and not w.reset else "lengths only"


class FusedTorchPlain(FusedTorch):
    """The same without lengths and resets: all steps of all rows are computed."""

    title = "fusedrnn.torch plain"

    @classmethod
    def takes(cls, w: Workload) -> Workload:
        return replace(w, lengths=1.0, reset=0.0)


class FusedTorchLoop(FusedTorch):
    """The same with a loop over the models."""

    title = "fusedrnn.torch loop"
    forward = Torch.forward

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        return super().refuses(w, which) if w.E > 1 else "one model"


def _blocks(a: np.ndarray, w: Workload, order: str, names: str) -> np.ndarray:
    """Gate blocks of the first axis, from `names` to `order`."""
    blocks = dict(zip(names, np.split(a, GATES[w.cell]), strict=True))
    return np.concatenate([blocks[gate] for gate in order])


_ORDER = {"rnn": "h", "lstm": "ifgo", "gru": "rzn"}


def _directions(data: Data, name: str, layer: int, order: str) -> np.ndarray:
    """One parameter of a layer, directions stacked, gates in another order."""
    w = data.workload
    return np.stack(
        [
            _blocks(data.params[f"{name}_l{layer}{suffix}"], w, order, _ORDER[w.cell])
            for suffix in ("", "_reverse")[: w.D]
        ]
    )


class OnnxRuntime(Rival):
    """The ONNX operators LSTM, GRU and RNN; bound inputs and outputs, so that nothing is copied around a run."""

    title = "onnxruntime"
    module = "onnxruntime"
    spins = 0.05

    def __init__(self, threads: int) -> None:
        import onnxruntime

        self.onnxruntime = onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    @classmethod
    def version(cls) -> str | None:
        return super().version() if importlib.util.find_spec("onnx") else None

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        return "no resets" if w.reset else super().refuses(w, which)

    def model(self, data: Data) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        w = data.workload
        order = {"rnn": "h", "lstm": "iofg", "gru": "zrn"}[w.cell]
        constants = {"flat": np.array([0, 0, -1], np.int64)}
        nodes = []
        lengths = "lengths" if data.lengths is not None else ""
        if data.lengths is not None:
            constants["lengths"] = data.lengths.astype(np.int32)
        last = "x"
        for layer in range(w.L):
            constants[f"W{layer}"] = _directions(data, "weight_ih", layer, order)
            constants[f"R{layer}"] = _directions(data, "weight_hh", layer, order)
            biases = [_directions(data, name, layer, order) for name in ("bias_ih", "bias_hh")]
            constants[f"b{layer}"] = np.concatenate(biases, axis=1)
            inputs = [last, f"W{layer}", f"R{layer}", f"b{layer}", lengths]
            direction = "bidirectional" if w.D == 2 else "forward"
            extra: dict[str, Any] = {"linear_before_reset": 1} if w.cell == "gru" else {}
            nodes += [
                helper.make_node(w.cell.upper(), inputs, [f"Y{layer}"], hidden_size=w.H, direction=direction, **extra),
                helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"Z{layer}", "flat"], [f"y{layer}"]),
            ]
            last = f"y{layer}"
        graph = helper.make_graph(
            nodes,
            "rnn",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, data.x.shape)],
            [helper.make_tensor_value_info(last, TensorProto.FLOAT, data.dy.shape)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opset = helper.make_opsetid("", 17)
        result: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
        return result

    def build(self, data: Data, which: str) -> Run:
        session = self.onnxruntime.InferenceSession(self.model(data), self.options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_cpu_input("x", data.x)
        binding.bind_output(f"y{data.workload.L - 1}", "cpu")

        def infer() -> Any:
            session.run_with_iobinding(binding)
            return binding

        return infer

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        return {"y": result.copy_outputs_to_cpu()[0]}


class OpenVINO(Rival):
    """LSTMSequence, GRUSequence and RNNSequence in their own batch-first layout; float32, which it must be told."""

    title = "openvino"
    module = "openvino"

    def __init__(self, threads: int) -> None:
        import openvino

        self.openvino = openvino
        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        return "no resets" if w.reset else super().refuses(w, which)

    def build(self, data: Data, which: str) -> Run:
        from openvino import opset13 as ops

        w = data.workload
        order = {"rnn": "h", "lstm": "figo", "gru": "zrn"}[w.cell]
        x = ops.parameter([w.B, w.T, w.I], np.float32)
        zeros = ops.constant(np.zeros((w.B, w.D, w.H), np.float32))
        lengths = ops.constant((np.full(w.B, w.T) if data.lengths is None else data.lengths).astype(np.int32))
        direction = "bidirectional" if w.D == 2 else "forward"
        last = x
        for layer in range(w.L):
            W, R, bW, bR = (
                _directions(data, name, layer, order) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            b = bW + bR
            if w.cell == "gru":  # the second product's new gate has a bias of its own
                H = w.H
                b = np.concatenate([b[:, : 2 * H], bW[:, 2 * H :], bR[:, 2 * H :]], axis=1)
            constants = [ops.constant(value) for value in (W, R, b)]
            if w.cell == "lstm":
                node = ops.lstm_sequence(last, zeros, zeros, lengths, *constants, w.H, direction)
            elif w.cell == "gru":
                node = ops.gru_sequence(last, zeros, lengths, *constants, w.H, direction, linear_before_reset=True)
            else:
                node = ops.rnn_sequence(last, zeros, lengths, *constants, w.H, direction)
            if w.D == 1:
                last = ops.squeeze(node.output(0), ops.constant(np.array([1], np.int64)))
            else:
                turned = ops.transpose(node.output(0), ops.constant(np.array([0, 2, 1, 3], np.int64)))
                last = ops.reshape(turned, ops.constant(np.array([w.B, w.T, w.D * w.H], np.int64)), False)
        model = self.openvino.Model([last], [x])
        request = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        held = np.ascontiguousarray(data.x.swapaxes(0, 1))
        request.set_input_tensor(self.openvino.Tensor(held, shared_memory=True))

        def infer() -> Any:
            request.infer()
            return request, held

        return infer

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        return {"y": result[0].get_output_tensor().data.swapaxes(0, 1)}


def _step(xp: Any, sigmoid: Any, cell: str, gx: Any, gh: Any, h: Any, c: Any) -> Any:
    """One time step as users write it: h and c from the two products."""
    if cell == "rnn":
        return xp.tanh(gx + gh), c
    H = h.shape[-1]
    if cell == "lstm":
        a = gx + gh
        i, f, o = sigmoid(a[:, :H]), sigmoid(a[:, H : 2 * H]), sigmoid(a[:, 3 * H :])
        c = f * c + i * xp.tanh(a[:, 2 * H : 3 * H])
        return o * xp.tanh(c), c
    rz = sigmoid(gx[:, : 2 * H] + gh[:, : 2 * H])
    n = xp.tanh(gx[:, 2 * H :] + rz[:, :H] * gh[:, 2 * H :])
    return n + rz[:, H:] * (h - n), c


class Jax(Rival):
    """jit, one input product for all steps, lax.scan over the recurrence; gradients by vjp in the same jit."""

    title = "jax"
    module = "jax"
    does = BOTH
    compiles = True

    def __init__(self, threads: int) -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        self.jax = jax
        self.compiled: dict[tuple[Workload, str], Any] = {}

    def function(self, data: Data, which: str) -> Any:
        jax, w = self.jax, data.workload
        if (w, which) not in self.compiled:
            forward = self.forward(w)

            def step(params: Any, x: Any, masks: Any, dy: Any) -> Any:
                y, pullback = jax.vjp(lambda params, x: forward(params, x, masks), params, x)
                return y, pullback(dy)

            self.compiled[w, which] = jax.jit(forward if which == "infer" else step)
        return self.compiled[w, which]

    def forward(self, w: Workload) -> Any:
        jnp, lax, sigmoid = self.jax.numpy, self.jax.lax, self.jax.nn.sigmoid

        def direction(params: Any, x: Any, masks: Any, suffix: str) -> Any:
            W, R, bW, bR = (params[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            gx = x @ W.T + bW

            def step(carry: Any, inputs: Any) -> Any:
                h, c = carry
                gx, masks = inputs
                if "keep" in masks:
                    h, c = h * masks["keep"], c * masks["keep"]
                # said this way because `h @ R.T` takes five times as long at batch 1
                gh = lax.dot_general(h, R, (((1,), (1,)), ((), ()))) + bR
                h_new, c_new = _step(jnp, sigmoid, w.cell, gx, gh, h, c)
                if "runs" not in masks:
                    return (h_new, c_new), h_new
                runs = masks["runs"]
                return (jnp.where(runs, h_new, h), jnp.where(runs, c_new, c)), jnp.where(runs, h_new, 0)

            zero = jnp.zeros((w.B, w.H), x.dtype)
            return lax.scan(step, (zero, zero), (gx, masks), reverse=suffix.endswith("reverse"))[1]

        def forward(params: Any, x: Any, masks: Any) -> Any:
            for layer in range(w.L):
                y = [direction(params, x, masks, f"l{layer}{suffix}") for suffix in ("", "_reverse")[: w.D]]
                x = y[0] if w.D == 1 else jnp.concatenate(y, axis=-1)
            return x

        return forward

    def build(self, data: Data, which: str) -> Run:
        jax, w = self.jax, data.workload
        function = self.function(data, which)
        params, x, dy = jax.tree.map(jax.numpy.asarray, (data.params, data.x, data.dy))
        masks = {}
        if data.reset is not None:
            masks["keep"] = jax.numpy.asarray(1 - data.reset.astype(np.float32))[..., None]
        if data.lengths is not None:
            masks["runs"] = jax.numpy.asarray((np.arange(w.T)[:, None] < data.lengths)[..., None])
        if which == "infer":
            return lambda: function(params, x, masks).block_until_ready()
        return lambda: jax.block_until_ready(function(params, x, masks, dy))

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        if which == "infer":
            return {"y": np.asarray(result)}
        y, (grads, dx) = result
        return {"y": np.asarray(y), "x": np.asarray(dx)} | {name: np.asarray(value) for name, value in grads.items()}


class NumPyLoop(Rival):
    """A loop over time in NumPy, float32, one layer: what people write who have nothing else."""

    title = "numpy loop"
    module = "numpy"

    def __init__(self, threads: int) -> None:
        pass

    @classmethod
    def refuses(cls, w: Workload, which: str) -> str | None:
        if w.L > 1 or w.D > 1 or w.lengths < 1 or w.reset:
            return "plain sizes only"
        return super().refuses(w, which)

    def build(self, data: Data, which: str) -> Run:
        w = data.workload
        W, R, bW, bR = (data.params[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

        def sigmoid(a: Any) -> Any:
            return 1 / (1 + np.exp(-a))

        def infer() -> Any:
            gx = data.x @ W.T + bW
            y = np.empty((w.T, w.B, w.H), np.float32)
            h = c = np.zeros((w.B, w.H), np.float32)
            for t in range(w.T):
                h, c = _step(np, sigmoid, w.cell, gx[t], h @ R.T + bR, h, c)
                y[t] = h
            return y

        return infer

    def answers(self, data: Data, which: str, result: Any) -> Answers:
        return {"y": result}


OURS = "fusedrnn"
OURS_TORCH = "fusedrnn.torch"
RIVALS: dict[str, type[Rival]] = {
    rival.title: rival
    for rival in (
        *(FusedRNN, Torch, OnnxRuntime, OpenVINO, Jax, NumPyLoop, FusedRNNNumba, FusedRNNRecompute, FusedRNNBfloat16),
        *(FusedTorch, FusedTorchPacked, FusedTorchPlain, FusedTorchLoop),
    )
}
PEERS = (OURS, "torch", "onnxruntime", "openvino", "jax")  # the others are measured on a few sizes
