"""Weights arrive whole, whenever the device copies; pages are locked only for that time, and nothing is left."""

from __future__ import annotations

import errno
import mmap
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_device import POLICIES, FakeDevice, NotingRegistrar
from pack.loaders.read_ahead import Told
from pack.offload import arrival, stretches
from pack.offload.arrival import send
from pack.offload.errors import RefusedError, SourceError
from pack.offload.files import StoredFile, Weight
from pack.offload.slots import Slot
from test_cancelled_source import Cancelled, Canceller
from test_slots import parameter
from test_source import PAGE, nothing_is_left  # noqa: F401  (a fixture)

SEEDS = range(8)


class Registrar(NotingRegistrar):
    """Knows the most bytes that were ever locked at once."""

    def __init__(self, most: int = 1 << 30) -> None:
        super().__init__(most)
        self.most_bytes = 0

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        assert read_only and address % PAGE == 0
        super().register(address, nbytes, read_only=read_only)
        self.most_bytes = max(self.most_bytes, sum(size for size, _ in list(self.registered.values())))

    def holds(self, data: torch.Tensor) -> bool:
        start, stop = data.data_ptr(), data.data_ptr() + data.nbytes
        return any(at <= start and stop <= at + size for at, (size, _) in list(self.registered.items()))


class Touching(Registrar):
    """The file changes when its pages are to be locked. (It is not cut off: the test has it mapped, too.)"""

    def __init__(self, path: Path, refuses: bool = True) -> None:
        super().__init__()
        self._path, self._refuses = path, refuses

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        self._path.touch()
        if self._refuses:
            raise RefusedError("bad address")
        super().register(address, nbytes, read_only=read_only)


class Gpu(FakeDevice):
    """Copies from locked pages, whenever it likes, and gives out so much memory."""

    def __init__(self, policy: str, seed: int, registrar: Registrar, memory: int = 1 << 30) -> None:
        super().__init__(policy, seed, registrar=registrar)
        self.memory = memory

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.memory -= nbytes
        if self.memory < 0:
            raise torch.OutOfMemoryError("no room")
        return super().allocate(nbytes)

    def copier(self, out: torch.Tensor, data: torch.Tensor) -> Callable[[], None]:
        assert isinstance(self.registrar, Registrar)
        if data.data_ptr() in self.staged:
            return super().copier(out, data)
        source = CheckedWhenCopied(data)
        source.registrar = self.registrar
        return super().copier(out, source)


class CheckedWhenCopied(torch.Tensor):
    registrar: Registrar

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.Tensor.copy_:
            plain = args[1].as_subclass(torch.Tensor)
            assert args[1].registrar.holds(plain), "copied from pages that are not locked"
            return args[0].copy_(plain)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class Model:
    """Weights anywhere in two files, some over the same bytes, and some in memory."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = random.Random(seed)
        self.files: list[Path] = []
        self.slots: list[Slot] = []
        self._where: dict[int, tuple[StoredFile, int]] = {}
        for name in ("one.bin", "two.bin"):
            path = folder / name
            path.write_bytes(rng.randbytes(60 * PAGE + rng.randrange(PAGE)))
            self.files.append(path)
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            data = torch.frombuffer(mapping, dtype=torch.uint8)
            stored, offset = StoredFile.of(path), rng.randrange(3)
            while len(data) - offset > 12 * PAGE:
                nbytes = rng.choice([1, 100, PAGE, rng.randrange(1, 12 * PAGE)])
                self._add(data[offset : offset + nbytes], stored, offset)
                if rng.random() < 0.1:
                    self._add(data[offset : offset + nbytes], stored, offset)  # tied
                offset += nbytes + rng.choice([0, 0, 5, 4 * PAGE])
        self.slots += [Slot(parameter(torch.full((PAGE,), number, dtype=torch.uint8))) for number in (1, 2)]
        rng.shuffle(self.slots)

    def _add(self, data: torch.Tensor, stored: StoredFile, offset: int) -> None:
        slot = Slot(parameter(data))
        self.slots.append(slot)
        self._where[slot.home.data_ptr()] = stored, offset

    def located(self, tensor: torch.Tensor) -> tuple[StoredFile, int] | None:
        return self._where.get(tensor.data_ptr())

    def bring(self, gpu: Gpu, may_pin: bool = True, canceller: Canceller | None = None) -> list[torch.Tensor]:
        watch = (canceller or Canceller(1 << 30)).watch
        return send(self.slots, gpu, lambda slot: None, self.located, may_pin, watch).wait()

    def check(self, arrived: list[torch.Tensor]) -> None:
        assert len(arrived) == len(self.slots)
        for slot, there in zip(self.slots, arrived, strict=True):
            assert torch.equal(slot.home, there) and there.data_ptr() != slot.home.data_ptr()


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "STRETCH_BYTES", 5 * PAGE)
    monkeypatch.setattr(arrival, "WORTH_LOCKING", 1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_byte_arrives(tmp_path: Path, policy: str, seed: int) -> None:
    model, registrar = Model(tmp_path, seed), Registrar()
    canceller = Canceller(1 << 30)
    model.check(model.bring(Gpu(policy, seed, registrar), canceller=canceller))
    assert registrar.asked > 10 and registrar.registered == {}
    assert registrar.most_bytes <= stretches.LOCKED * stretches.STRETCH_BYTES
    assert not canceller.unfinished


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stretch_holds_every_byte_of_the_weights_on_it_once(tmp_path: Path, seed: int) -> None:
    model = Model(tmp_path, seed)
    weights = {number: slot.weight(model.located) for number, slot in enumerate(model.slots)}
    in_files = {number: weight for number, weight in weights.items() if weight.file is not None}
    seen: dict[int, list[tuple[int, int]]] = {number: [] for number in in_files}
    for stretch in stretches.cut(in_files):
        assert stretch.start % PAGE == 0 and 0 < stretch.stop - stretch.start <= stretches.STRETCH_BYTES
        for part in stretch.parts:
            weight = in_files[part.number]
            assert weight.file == stretch.file and part.offset == weight.offset + part.start
            assert stretch.start <= part.offset and part.offset + part.stop - part.start <= stretch.stop
            seen[part.number].append((part.start, part.stop))
    for number, parts in seen.items():
        ends = [0, *(stop for _, stop in parts)]
        assert [start for start, _ in parts] == ends[:-1] and ends[-1] == in_files[number].nbytes


@pytest.mark.parametrize("most", [0, 1, 2, 9])
def test_where_locking_ends_the_slow_way_begins(tmp_path: Path, most: int) -> None:
    model, registrar, canceller = Model(tmp_path, 0), Registrar(most), Canceller(1 << 30)
    model.check(model.bring(Gpu("random", 0, registrar), canceller=canceller))
    assert registrar.asked > most and registrar.registered == {} and not canceller.unfinished


def test_nothing_is_locked_where_that_is_switched_off(tmp_path: Path) -> None:
    model, registrar = Model(tmp_path, 0), Registrar()
    model.check(model.bring(Gpu("late", 0, registrar), may_pin=False))
    assert registrar.asked == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_cancelled_anywhere(tmp_path: Path, policy: str) -> None:
    model, cancelled = Model(tmp_path, 3), 0
    for at in range(1000):
        registrar, gpu = Registrar(), Gpu(policy, at, Registrar())
        gpu.registrar = registrar
        try:
            model.check(model.bring(gpu, canceller=Canceller(at)))
        except Cancelled:
            cancelled += 1
            assert registrar.registered == {}
            continue
        break
    assert cancelled > 10


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_out_of_memory_leaves_nothing(tmp_path: Path, share: float) -> None:
    model, registrar = Model(tmp_path, 1), Registrar()
    whole = sum(slot.nbytes for slot in model.slots)
    with pytest.raises(torch.OutOfMemoryError):
        model.bring(Gpu("late", 0, registrar, memory=int(share * whole)))
    assert registrar.registered == {}
    model.check(model.bring(Gpu("late", 0, registrar, memory=whole)))


def test_a_file_that_changes_on_the_way_is_told(tmp_path: Path) -> None:
    model, registrar = Model(tmp_path, 2), Touching(tmp_path / "one.bin", refuses=False)
    with pytest.raises(SourceError, match="changed since it was loaded"):
        model.bring(Gpu("random", 0, registrar))
    assert registrar.registered == {}


def test_a_file_that_changed_is_not_touched_where_locking_is_refused(tmp_path: Path) -> None:
    """The mapping of a file that was cut off may kill the process, so nothing goes the slow way."""
    model = Model(tmp_path, 2)
    with pytest.raises(SourceError, match="changed since it was loaded"):
        model.bring(Gpu("random", 0, Touching(tmp_path / "one.bin")))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_cannot_be_mapped(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two: nothing stays of the first, and the weights go the slow way."""
    model, asked, make = Model(tmp_path, 3), [], mmap.mmap

    def refusing(*args: object, **options: object) -> mmap.mmap:
        asked.append(args)
        if len(asked) == 2:
            raise error(errno.ENOMEM, "Cannot allocate memory")
        return make(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(mmap, "mmap", refusing)
    gpu = Gpu("random", 0, registrar := Registrar())
    if error is OSError:
        model.check(model.bring(gpu))
    else:
        with pytest.raises(KeyboardInterrupt):
            model.bring(gpu)
    assert len(asked) == 2 and registrar.registered == {}


def test_a_weight_that_changes_its_type_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "half.bin"
    values = torch.randn(3 * PAGE, dtype=torch.float32)
    path.write_bytes(values.numpy().tobytes())
    slot, stored = Slot(parameter(values)), StoredFile.of(path)
    gpu = Gpu("late", 0, Registrar())
    (there,) = send([slot], gpu, lambda one: torch.bfloat16, lambda tensor: (stored, 0), True).wait()
    assert there.dtype is torch.bfloat16 and torch.equal(there, values.bfloat16())


def test_weights_are_told_as_they_arrive(tmp_path: Path) -> None:
    model = Model(tmp_path, 4)
    amounts: list[int] = []
    weights = {number: slot.weight(model.located) for number, slot in enumerate(model.slots)}
    in_files: dict[int, Weight] = {number: weight for number, weight in weights.items() if weight.file is not None}
    told: Told = amounts.append
    there, refusal = stretches.copied(in_files, Gpu("early", 0, Registrar()), told)
    assert refusal == "" and there.keys() == in_files.keys()
    assert sum(amounts) == sum(weight.nbytes for weight in in_files.values()) and len([a for a in amounts if a]) > 5
