"""The bridge to SEAL: BFV ciphertexts of one parameter set as numpy arrays, in and out.

TenSEAL's bindings take and give arrays element by element, or a whole object through a *path*.
The path of an anonymous memory file, and a SEAL object assembled here around the numpy buffer, load
at memory speed. Every byte that reaches a SEAL loader was assembled here, from arrays of fixed
length whose residues were checked: SEAL before 4.4 reads untrusted bytes unsafely, and its format
is stamped with its version, which is why nothing of it travels.

SEAL 4's layout, little-endian:

    header     = u16 0xA15E, u8 16, u8 major, u8 minor, u8 compression, u16 0, u64 size of it all
    array      = header, u64 count, count x u64
    plaintext  = header, parms_id(32), u64 coefficients, f64 scale, array        (a secret key too)
    ciphertext = header, parms_id(32), u8 NTT form, u64 polynomials, u64 degree, u64 primes,
                 f64 scale, u64 correction, array [, header, u8 1 (BLAKE2Xb), seed(64)]

An array of one polynomial followed by a seed is a ciphertext whose c1 is BLAKE2Xb's stream of the
seed, sampled modulo q: (c0, seed) is all that an update needs to carry.

SEAL's calls hold the GIL, each for 0.1-0.4 ms. A `Ring` belongs to one thread at a time, and to the
process that made it: a child of fork would share its memory file.
"""

import os
import struct
import sys
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackendMissing
from .parameters import MODULUS, RING_DEGREE

try:
    import tenseal.sealapi as seal

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError as error:
    raise BackendMissing("TenSEAL and Zstandard", "both installed", error.name) from error

SEED_SIZE = 64

_HEADER = struct.Struct("<HBBBBHQ")
_COUNT = struct.Struct("<Q")
_PLAINTEXT = struct.Struct("<32sQd")
_CIPHERTEXT = struct.Struct("<32sBQQQdQ")
_MAGIC, _UNCOMPRESSED, _ZSTD, _BLAKE2XB = 0xA15E, 0, 2, b"\x01"
_UNBOUND = bytes(32)  # parms_id of a plaintext that is not in NTT form
_LARGEST_OBJECT = 1 << 18  # bytes: more than a ciphertext of two polynomials

Words = NDArray[np.uint64]
Ciphertext = Any  # seal.Ciphertext: the bindings carry no types


class _ObjectFile:
    """The path through which objects pass: anonymous memory, or a private temporary file."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("fedloom-bfv", os.MFD_CLOEXEC)
            self.path = f"/proc/self/fd/{descriptor}"
            weakref.finalize(self, os.close, descriptor)
        else:  # readable by this user alone; secrets pass through it, so it is emptied after a key
            descriptor, self.path = tempfile.mkstemp(prefix="fedloom-bfv-")
            os.close(descriptor)
            weakref.finalize(self, Path(self.path).unlink, missing_ok=True)

    def put(self, *parts: bytes) -> str:
        with open(self.path, "wb") as file:
            file.write(b"".join(parts))
        return self.path

    def take(self) -> bytes:
        """Return the members of the object that SEAL saved last, without its outer header."""
        with open(self.path, "rb") as file:
            saved = file.read()
        compression = saved[5]
        if compression not in (_UNCOMPRESSED, _ZSTD):
            raise BackendMissing("SEAL's compression", "Zstandard or none", compression)
        members = saved[_HEADER.size :]
        if compression == _UNCOMPRESSED:
            return members
        return zstd.ZstdDecompressor().decompress(members, _LARGEST_OBJECT)  # good for one frame


@cache  # 7 ms to make, immutable, without secrets
def _context(plain_bits: int) -> Any:
    settings = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    settings.set_poly_modulus_degree(RING_DEGREE)
    primes = seal.CoeffModulus.Create(RING_DEGREE, [60])
    if [prime.value() for prime in primes] != [MODULUS]:
        raise BackendMissing("SEAL's 60-bit prime", MODULUS, "another")
    settings.set_coeff_modulus(primes)
    settings.set_plain_modulus(1 << plain_bits)
    context = seal.SEALContext(settings, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise BackendMissing("SEAL's verdict", "valid parameters", context.parameters_error_name())
    return context


class Ring:
    """Ciphertexts of N = 4096, q = 2^60 - 16383, t = 2^T, without any key: adding is all it can."""

    def __init__(self, plain_bits: int) -> None:
        self._context = _context(plain_bits)
        self.plain_bits = plain_bits
        self._parms_id = self._context.first_parms_id()
        self._parms_bytes = struct.pack("<4Q", *self._parms_id)
        self._evaluator = seal.Evaluator(self._context)
        self._file = _ObjectFile()
        version = seal.Serialization.SEALHeader()
        self._version = (version.version_major, version.version_minor)

    def seeded(self, c0: Words, seed: bytes) -> Ciphertext:
        """Make a ciphertext of c0, (4096,) residues, and of the c1 that the seed expands to."""
        expander = self._header(_HEADER.size + 1 + SEED_SIZE) + _BLAKE2XB + seed
        return self._ciphertext(c0.tobytes(), expander)

    def ciphertext(self, c0: Words, c1: Words) -> Ciphertext:
        """Make a ciphertext of two polynomials, (4096,) residues each."""
        return self._ciphertext(c0.tobytes() + c1.tobytes(), b"")

    def add(self, total: Ciphertext, summand: Ciphertext) -> None:
        """Add the summand to the total, in place."""
        self._evaluator.add_inplace(total, summand)

    def plus(self, total: Ciphertext, coefficients: Words) -> Ciphertext:
        """Return a new ciphertext: the total plus a public plaintext, (4096,) u64 below t."""
        corrected = seal.Ciphertext()
        self._evaluator.add_plain(total, self._plaintext(coefficients), corrected)
        return corrected

    def residues(self, ciphertext: Ciphertext) -> tuple[Words, Words]:
        """Return c0 and c1, (4096,) u64 below q each."""
        ciphertext.save(self._file.path)
        start = _CIPHERTEXT.size + _HEADER.size + _COUNT.size
        both = np.frombuffer(self._file.take(), "<u8", 2 * RING_DEGREE, start)
        return both[:RING_DEGREE], both[RING_DEGREE:]

    def _ciphertext(self, polynomials: bytes, expander: bytes) -> Ciphertext:
        fields = _CIPHERTEXT.pack(self._parms_bytes, 0, 2, RING_DEGREE, 1, 1.0, 1)
        loaded = seal.Ciphertext()
        loaded.load(self._context, self._put(fields, polynomials, expander))
        return loaded

    def _plaintext(self, coefficients: Words) -> Any:
        loaded = seal.Plaintext()
        fields = _PLAINTEXT.pack(_UNBOUND, RING_DEGREE, 1.0)
        loaded.load(self._context, self._put(fields, coefficients.tobytes()))
        return loaded

    def _put(self, fields: bytes, array: bytes, tail: bytes = b"") -> str:
        framed = _HEADER.size + _COUNT.size + len(array)
        return self._file.put(
            self._header(_HEADER.size + len(fields) + framed + len(tail)),
            fields,
            self._header(framed),
            _COUNT.pack(len(array) // 8),
            array,
            tail,
        )

    def _header(self, size: int) -> bytes:
        return _HEADER.pack(_MAGIC, _HEADER.size, *self._version, _UNCOMPRESSED, 0, size)


class KeyedRing(Ring):
    """The same ring in the hands of someone who holds the secret polynomial."""

    def __init__(self, plain_bits: int, secret: NDArray[np.int8]) -> None:
        """Take the secret as (4096,) int8 in {-1, 0, 1}, coefficient of x^0 first."""
        super().__init__(plain_bits)
        key = self._secret_key(secret)
        self._encryptor = seal.Encryptor(self._context, key)
        self._decryptor = seal.Decryptor(self._context, key)

    def encrypt(self, coefficients: Words) -> tuple[Words, bytes]:
        """Encrypt (4096,) u64 below t; return c0, (4096,) u64 below q, and the seed of c1.

        Noise and seed come from SEAL's generator, seeded anew by the operating system in each call.
        """
        self._encryptor.encrypt_symmetric(self._plaintext(coefficients)).save(self._file.path)
        saved = self._file.take()
        start = _CIPHERTEXT.size + _HEADER.size + _COUNT.size
        c0 = np.frombuffer(saved, "<u8", RING_DEGREE, start)
        expander = saved[start + 8 * RING_DEGREE :]
        if len(expander) != _HEADER.size + 1 + SEED_SIZE or expander[16:17] != _BLAKE2XB:
            raise BackendMissing("SEAL's seeded ciphertext", "81 bytes after c0", len(expander))
        return c0, expander[-SEED_SIZE:]

    def decrypt(self, ciphertext: Ciphertext) -> Words:
        """Return the coefficients, (4096,) u64 below t."""
        opened = seal.Plaintext()
        self._decryptor.decrypt(ciphertext, opened)
        found = self._words(opened)
        coefficients = np.zeros(RING_DEGREE, np.uint64)
        coefficients[: len(found)] = found  # SEAL leaves leading zeros out
        return coefficients

    def _secret_key(self, secret: NDArray[np.int8]) -> Any:
        """Let SEAL transform the polynomial, and load its residues as SEAL's secret key."""
        modulo_t = secret.astype(np.int64) % (1 << self.plain_bits)  # -1 becomes t - 1
        polynomial = self._plaintext(modulo_t.astype(np.uint64))
        self._evaluator.transform_to_ntt_inplace(polynomial, self._parms_id)
        residues = self._words(polynomial)  # (4096,) u64 below q, NTT form
        key = seal.SecretKey()
        fields = _PLAINTEXT.pack(self._parms_bytes, RING_DEGREE, 1.0)
        key.load(self._context, self._put(fields, residues.tobytes()))
        self._file.put()
        return key

    def _words(self, plaintext: Any) -> Words:
        plaintext.save(self._file.path)
        saved = self._file.take()
        (count,) = _COUNT.unpack_from(saved, _PLAINTEXT.size + _HEADER.size)
        start = _PLAINTEXT.size + _HEADER.size + _COUNT.size
        return np.frombuffer(saved, "<u8", count, start)
