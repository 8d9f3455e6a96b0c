"""What is claimed for GPUs, each tried with a small model, for benchmarks/gpu.py.

A claim is a function of the device. It returns what was measured, or raises.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from gpu_steps import (
    MASK_RATIO,
    WARM_UP_CALLS,
    autocast,
    free_memory,
    make_batch,
    make_tokenizer,
    one_line,
    seconds_per_call,
    synchronize,
    training_step,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PrinterCallback, TrainerCallback

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction
from bert4rec_hf.defaults import HEAD_WIDTH
from bert4rec_hf.model import layers, modeling_bert4rec
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from bert4rec_hf.model.losses import IGNORE_INDEX, ITEM_LOSSES

# Largest norm of a difference, as a share of the norm: rounding in float32 and in half precision.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.02}


class RefutedError(Exception):
    """A claim does not hold."""


class NotApplicableError(Exception):
    """A claim says nothing about this device, or the device lacks what it takes to try it."""


def expect(holds: bool | torch.Tensor, found: str) -> str:
    if not holds:
        raise RefutedError(found)
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, as a share of the norm."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def small_model(device: torch.device, **options: Any) -> Bert4RecForMaskedItemPrediction:
    """A model of 200 items whose scores differ by more than rounding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 203, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 16}
    plain = {"hidden_dropout_prob": 0.0, "initializer_range": 0.1}
    return Bert4RecForMaskedItemPrediction(Bert4RecConfig(**(sizes | plain | options))).to(device)


def small_batch(device: torch.device, num_negatives: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return make_batch(200, [16, 9, 12, 3], device, num_negatives)


def padded_inputs(device: torch.device) -> torch.Tensor:
    """(3, 16) token ids with a [MASK] at the end of each history, padded on the left, on the right, and not at all."""
    input_ids = torch.arange(FIRST_ITEM_ID, FIRST_ITEM_ID + 48).view(3, 16)
    input_ids[:, -1] = MASK_TOKEN_ID
    input_ids[0, :5] = PAD_TOKEN_ID
    input_ids[1, 9:] = PAD_TOKEN_ID
    input_ids[1, 8] = MASK_TOKEN_ID
    return input_ids.to(device)


def precisions(device: torch.device) -> str:
    losses = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = small_model(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == torch.float16)
        with autocast(device, dtype):
            loss = model(**small_batch(device)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expect(norm.isfinite() & (norm > 0), f"the gradients in {dtype} have the norm {norm.item()}")
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    single, *others = losses
    found = "losses " + ", ".join(f"{loss:.4f}" for loss in losses)
    return expect(all(abs(other - single) < 0.01 * single for other in others), found)


def make_trainer(device: torch.device, folder: str, callbacks: Sequence[Any] = (), **options: Any) -> Any:
    """A trainer for histories that count upwards, evaluated on the next item."""
    from bert4rec_hf import Bert4RecTrainer, Bert4RecTrainingArguments

    rows = [[FIRST_ITEM_ID + (start + place) % 40 for place in range(12)] for start in range(0, 40, 2)]
    ranking_rows = [
        {
            "input_ids": [*row[:-1], MASK_TOKEN_ID],
            "labels": [IGNORE_INDEX] * (len(row) - 1) + row[-1:],
            "history_ids": row[:-1],
            "exclude_ids": row[:-1],
        }
        for row in rows
    ]
    plain = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0,
        "mask_ratio": MASK_RATIO, "train_sampling_strategy": "random", "eval_strategy": "no", "save_strategy": "no",
        "logging_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True, "report_to": "none",
        "use_cpu": device.type == "cpu",
    }  # fmt: skip
    trainer = Bert4RecTrainer(
        small_model(device, hidden_dropout_prob=0.1),
        Bert4RecTrainingArguments(folder, **(plain | options)),
        train_dataset=[{"input_ids": row} for row in rows],
        eval_dataset=ranking_rows,
        processing_class=make_tokenizer(200),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_learns(device: torch.device, **precision: bool) -> str:
    if device.type == "cpu" and "fp16" in precision:
        raise NotApplicableError("the Trainer has fp16 on GPUs only")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(device, folder, num_train_epochs=8, logging_strategy="epoch", **precision)
        trainer.train()
        metrics = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = f"loss {losses[0]:.2f} falls to {losses[-1]:.2f}, NDCG@10 {metrics['eval_NDCG@10']:.2f}"
    is_on_device = trainer.model.device.type == device.type
    return expect(is_on_device and losses[-1] < 0.8 * losses[0] and metrics["eval_NDCG@10"] > 0.1, found)


def compile_backend(device: torch.device) -> str:
    """The backend of `torch.compile`. On a CPU, it captures graphs, but generates no code, which takes a minute."""
    if device.type == "cpu":
        return "aot_eager"
    if importlib.util.find_spec("triton") is None or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise NotApplicableError("torch.compile needs Triton and a C compiler")
    return "inductor"


def compiling(device: torch.device) -> str:
    backend = compile_backend(device)
    torch.compiler.reset()
    model, batch = small_model(device).eval(), small_batch(device)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        inputs = {"input_ids": padded_inputs(device)}
        found = difference(compiled(**inputs).logits[..., FIRST_ITEM_ID:], model(**inputs).logits[..., FIRST_ITEM_ID:])
    model.train()
    step = training_step(model, batch, torch.bfloat16, compiled)
    step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for values in batch.values():
                values.copy_(values.flip(0))  # other values of the same shapes
            step()
    return expect(found < ALLOWED[torch.float32], f"backend {backend}, relative difference of the logits {found:.1e}")


def device_map(device: torch.device) -> str:
    model = small_model(torch.device("cpu"), num_transitions=4, repeat_weight=0.5).eval()
    scores = model.history_scores
    numbers = torch.arange(200).unsqueeze(1)
    scores.successor_ids[FIRST_ITEM_ID:] = (numbers + torch.arange(1, 5)) % 200 + FIRST_ITEM_ID
    scores.successor_scores[FIRST_ITEM_ID:] = torch.rand(200, 4)
    place = "cuda:0" if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = Bert4RecForMaskedItemPrediction.from_pretrained(folder, device_map=place)
    targets = torch.arange(100, 103)
    inputs = padded_inputs(torch.device("cpu"))
    wanted, wanted_ids = model.recommend(inputs, exclude_ids=inputs)
    found, found_ids = other.recommend(inputs.to(place), exclude_ids=inputs.to(place))
    ranks = other.rank(inputs.to(place), targets.to(place)).cpu()
    expect(other.device == torch.device(place), f"the model is on {other.device}")
    expect(torch.equal(found_ids.cpu(), wanted_ids), "other items are recommended")
    expect(torch.equal(ranks, model.rank(inputs, targets)), "targets have other ranks")
    change = difference(found.cpu(), wanted)
    return expect(
        change < ALLOWED[torch.float32],
        f"on {place}, equal ids and ranks, relative difference of the scores {change:.1e}",
    )


class NoDataDependentOperations(TorchDispatchMode):
    """Raises at operations for whose result Python would wait, if they ran on a GPU."""

    waiting = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.waiting or by_mask:
            raise RefutedError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """A context in which waiting for the device is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        # The model chooses its code for GPUs.
        with contextlib.ExitStack() as as_on_a_gpu:
            for module in (layers, modeling_bert4rec):
                as_on_a_gpu.enter_context(mock.patch.object(module, "is_eager_on_cpu", return_value=False))
            as_on_a_gpu.enter_context(NoDataDependentOperations())
            yield


def step_without_waiting(device: torch.device) -> str:
    for item_loss in ITEM_LOSSES:
        model = small_model(device, item_loss=item_loss, filter_seen_items=True, hidden_dropout_prob=0.1).train()
        batch = small_batch(torch.device("cpu"), num_negatives=0 if item_loss == "softmax" else 20)
        if device.type == "cuda":
            batch = {name: values.pin_memory() for name, values in batch.items()}
        for dtype in (torch.float32, torch.bfloat16):
            step = training_step(model, batch, dtype)
            for _ in range(WARM_UP_CALLS):
                step()
            synchronize(device)
            with no_waiting(device):
                step()
                step()
            synchronize(device)
    return f"{', '.join(ITEM_LOSSES)}, each in float32 and bf16"


class GuardSteps(TrainerCallback):
    """Makes waiting an error in each step but the first ones."""

    def __init__(self, device: torch.device, guards: contextlib.ExitStack):
        self.device, self.guards, self.num_guarded = device, guards, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= WARM_UP_CALLS:
            self.guards.enter_context(no_waiting(self.device))
            self.num_guarded += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guards.close()


def trainer_without_waiting(device: torch.device) -> str:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as guards:
        guard = GuardSteps(device, guards)
        make_trainer(device, folder, [guard], bf16=True).train()
    return expect(guard.num_guarded > 0, f"{guard.num_guarded} steps")


def pinned_batches(device: torch.device) -> str:
    if device.type == "cpu":
        raise NotApplicableError("nothing is copied to a CPU")
    with tempfile.TemporaryDirectory() as folder:
        loader = make_trainer(device, folder).get_train_dataloader()
        copied = list(loader)
        with no_waiting(device):
            copied += list(loader)
        loader.device = None  # Accelerate's loader then leaves batches where they are
        are_pinned = all(values.is_pinned() for batch in loader for values in batch.values())
    are_on_device = all(values.is_cuda for batch in copied for values in batch.values())
    return expect(are_pinned and are_on_device, f"pinned: {are_pinned}, on the device: {are_on_device}")


def like_eager(device: torch.device, implementation: str, dtype: torch.dtype = torch.float32) -> str:
    if implementation == "flash_attention_2" and (device.type == "cpu" or not importlib.util.find_spec("flash_attn")):
        raise NotApplicableError("it needs a GPU and the package flash_attn")
    if implementation == "flex_attention":
        compile_backend(device)  # raises if the device lacks what it takes
    model, input_ids = small_model(device).eval().to(dtype), padded_inputs(device)
    model.set_attn_implementation("eager")
    # On a CPU, flex attention is not compiled, which would take half a minute.
    stance = "force_eager" if device.type == "cpu" else "default"
    with torch.no_grad(), torch.compiler.set_stance(stance):
        wanted = model(input_ids=input_ids).logits
        model.set_attn_implementation(implementation)
        found = model(input_ids=input_ids).logits
    is_token = input_ids != PAD_TOKEN_ID
    change = difference(found[is_token][:, FIRST_ITEM_ID:], wanted[is_token][:, FIRST_ITEM_ID:])
    if device.type == "cuda":
        training_step(model.train(), small_batch(device), torch.bfloat16)()
    return expect(change < ALLOWED[dtype], f"relative difference of the logits {change:.1e}")


def flash_kernel(device: torch.device) -> str:
    """Without `attention_mask` and `input_ids`, the model makes no mask, which the flash kernel does not take."""
    model, dtype = small_model(device).eval().bfloat16(), torch.bfloat16
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        embeds = model.get_input_embeddings()(padded_inputs(device)[2:])
        model.set_attn_implementation("sdpa")
        found = model(inputs_embeds=embeds).logits[..., FIRST_ITEM_ID:]
        model.set_attn_implementation("eager")
        change = difference(found, model(inputs_embeds=embeds).logits[..., FIRST_ITEM_ID:])
    rows = 1024 if device.type == "cuda" else 2  # so many of the step that gpu.py measures
    query, key, value = (
        torch.randn(rows, 8, 200, HEAD_WIDTH, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    mask = torch.zeros(rows, 1, 1, 200, device=device, dtype=dtype)

    def attend(mask: torch.Tensor | None) -> None:
        context = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.autograd.grad(context, (query, key, value), torch.ones_like(context))

    masked = seconds_per_call(partial(attend, mask), device, 0.1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = seconds_per_call(partial(attend, None), device, 0.1)
    times = f"{rows} histories of 200 with 8 heads take {1000 * flash:.2f} ms, with a mask {1000 * masked:.2f} ms"
    return expect(change < ALLOWED[dtype], f"relative difference of the logits {change:.1e}; {times}")


def one_process(device: torch.device) -> float:
    """The difference between the gradients of a step with and without DistributedDataParallel."""
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    plain, wrapped = small_model(device).train(), small_model(device).train()
    parallel = nn.parallel.DistributedDataParallel(wrapped, device_ids=[0] if device.type == "cuda" else None)
    for model in (plain, parallel):
        model(**small_batch(device)).loss.backward()
    wanted, found = (torch.cat([weight.grad.flatten() for weight in model.parameters()]) for model in (plain, wrapped))
    return difference(found, wanted)


def distributed(device: torch.device) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, __file__, device.type]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=180)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    change = float(done.stdout.split()[-1])
    return expect(change < ALLOWED[torch.float32], f"relative difference of the gradients {change:.1e}")


class StopAfterAnEpoch(TrainerCallback):
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def resuming(device: torch.device) -> str:
    def weights_after(folder: str, callbacks: Sequence[Any] = (), resume: bool = False) -> torch.Tensor:
        trainer = make_trainer(device, folder, callbacks, save_strategy="epoch")
        trainer.train(resume_from_checkpoint=resume)
        return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()

    with tempfile.TemporaryDirectory() as unbroken_folder, tempfile.TemporaryDirectory() as folder:
        unbroken = weights_after(unbroken_folder)
        stopped = weights_after(folder, [StopAfterAnEpoch()])
        resumed = weights_after(folder, resume=True)
    expect(not torch.equal(stopped, unbroken), "the run did not stop after the first epoch")
    change = ((resumed - unbroken).norm() / (unbroken - stopped).norm()).item()
    # On a GPU, sums over the occurrences of an item have no fixed order.
    allowed = 0.01 if device.type == "cuda" else 0.0
    return expect(change <= allowed, f"weights differ by {change:.1e} of what the second epoch changes")


CLAIMS: dict[str, Callable[[torch.device], str]] = {
    "A training step in float32, bf16 and fp16 has finite gradients and nearly the same loss": precisions,
    "`Bert4RecTrainer` learns and evaluates with `bf16=True`": partial(trainer_learns, bf16=True),
    "`Bert4RecTrainer` learns and evaluates with `fp16=True`": partial(trainer_learns, fp16=True),
    "`torch.compile` gives the eager logits, and its training step compiles once for equal shapes": compiling,
    "A model loaded with `device_map` recommends and ranks as on a CPU": device_map,
    "A training step never waits for the device": step_without_waiting,
    "A step of `Bert4RecTrainer` never waits for the device": trainer_without_waiting,
    "The Trainer's batches are pinned, and copied without waiting": pinned_batches,
    "`sdpa` equals eager attention, with padding on either side": partial(like_eager, implementation="sdpa"),
    "The flash kernel alone, in bf16 without padding, equals eager attention": flash_kernel,
    "`flex_attention` equals eager attention": partial(like_eager, implementation="flex_attention"),
    "`flash_attention_2` in bf16 equals eager attention": partial(
        like_eager, implementation="flash_attention_2", dtype=torch.bfloat16
    ),
    "A step in DistributedDataParallel, with NCCL (gloo on a CPU) and one process, equals the plain one": distributed,
    "A run resumed after an epoch has the unbroken run's weights": resuming,
}


def prove(claim: Callable[[torch.device], str], device: torch.device) -> str:
    free_memory(device)
    try:
        found = claim(device)
        synchronize(device)  # errors of the device come late
        return f"holds: {found}"
    except NotApplicableError as reason:
        return f"not applicable on {device.type}: {reason}"
    except ModuleNotFoundError as error:
        return f"not applicable on {device.type}: {error}"
    except RefutedError as error:
        return f"refuted: {error}"
    except Exception as error:
        return f"refuted: {one_line(error)}"


if __name__ == "__main__":
    print(one_process(torch.device(sys.argv[1])), flush=True)
    os._exit(0)  # a process with a process group sometimes fails when the interpreter exits
