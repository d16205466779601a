"""Against the `safetensors` package: the same verdict on sound and hostile files, the same arrays out of the same file."""
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import safetensors  # noqa: E402
import onebitmerge as obm  # noqa: E402
import safetensors.numpy  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))
from make_safetensors import HOSTILE, SOUND, STRICTER, pack  # noqa: E402

# What the messages of those refusals say that the package does not share.
OWN_RULES = re.compile(r"duplicate|does not begin with|dimensions, at most|product is too large|unknown dtype|NUL byte|expected an object")
# What the package alone refuses: -0 as an integer, and JSON nested deeper than 128.
THEIR_RULES = re.compile(rb"-0|\[{100}")


def theirs(data):
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


@pytest.fixture
def refusal(tmp_path):
    """A file's bytes -> None when it opens, else the message."""
    path = tmp_path / "case.safetensors"

    def refusal(data):
        path.write_bytes(data)
        try:
            checkpoint = obm.Checkpoint(str(path))
        except obm.Error as e:
            return str(e)
        for name in checkpoint:
            checkpoint[name]
        return None

    return refusal


@pytest.mark.parametrize("name", SOUND)
def test_sound(name, refusal):
    assert theirs(SOUND[name]) and refusal(SOUND[name]) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, refusal):
    assert not theirs(HOSTILE[name]) and refusal(HOSTILE[name])


@pytest.mark.parametrize("name", STRICTER)
def test_stricter(name, refusal):
    assert theirs(STRICTER[name])
    assert OWN_RULES.search(refusal(STRICTER[name]))


def mutate(r, data):
    """One to three edits of bytes; half of the time the length field is made right again, so that the JSON is reached."""
    data = bytearray(data)
    for _ in range(r.randrange(1, 4)):
        at = r.randrange(len(data) + 1)
        kind = r.randrange(3)
        if kind == 0:
            data[at:at + 1] = bytes([r.choice(b'0123456789-,:[]{}"aUF8\\ ')])
        elif kind == 1:
            del data[at:at + r.randrange(1, 5)]
        else:
            data[at:at] = bytes([r.choice(b'0123456789-,[]{}" \0\xff')])
    if r.random() < 0.5 and b"}" in data[8:]:
        end = data.rindex(b"}") + 1
        return pack(bytes(data[8:end]), bytes(data[end:]))
    return bytes(data)


def test_mutations(refusal):
    r = random.Random("safetensors")
    seeds, both = list(SOUND.values()), 0
    for _ in range(4000):
        data = mutate(r, r.choice(seeds))
        accepted, message = theirs(data), refusal(data)
        if accepted and message is not None:
            assert OWN_RULES.search(message), (data, message)
        if not accepted and message is None:
            assert THEIR_RULES.search(data), data
        both += accepted and message is None
    assert 100 < both < 3900


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
                                   "uint16", "uint32", "uint64"])
def test_arrays(dtype, tmp_path):
    rng = np.random.default_rng(5)
    arrays = {f"{i}.{len(shape)}d": np.asarray(rng.standard_normal(shape) * 100).astype(dtype)
              for i, shape in enumerate([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4, 5)])}
    path = tmp_path / "arrays.safetensors"
    safetensors.numpy.save_file(arrays, path)
    checkpoint = obm.Checkpoint(str(path))
    assert sorted(checkpoint) == sorted(arrays)
    for name, array in arrays.items():
        ours = np.asarray(checkpoint[name])
        assert ours.dtype == array.dtype and ours.shape == array.shape
        assert ours.tobytes() == array.tobytes()
