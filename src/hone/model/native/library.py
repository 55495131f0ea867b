"""The C functions with their argument types."""

import ctypes
import functools
import logging

from hone.model.native import build

logger = logging.getLogger(__name__)

# p pointer, l long, i int, f float; every function returns an int or nothing.
_ARGUMENTS = {
    "hone_packed_size": "ll",
    "hone_pack": "pllp",
    "hone_linear": "plppppllli",
    "hone_product": "pppllli",
    "hone_product_transposed": "pppllli",
    "hone_rms_norm": "pllpfppll",
    "hone_add_rms_norm": "pppfppll",
    "hone_rms_norm_backward": "ppllppppll",
    "hone_rotary": "pllpllpppp" + "llli",
    "hone_swiglu": "ppll",
    "hone_swiglu_backward": "pppll",
    "hone_token_logprobs": "ppplppll",
    "hone_token_logprobs_backward": "pppplppll",
    "hone_draw": "ppppll",
    "hone_write_cache": "plplpppll",
    "hone_route": "ppppp" + "lllll" + "iif",
    "hone_route_backward": "pppp" + "lll" + "iif",
    "hone_mlp": "pppppp" + "llli",
    "hone_mixture": "ppppppppppppp" + "llllllll" + "iifi",
    "hone_experts": "ppppppppppp" + "llllli",
    "hone_experts_backward": "pppppppppppp" + "llllli",
    "hone_packed_attention": "plplpl" + "pfpp" + "lllli",
    "hone_packed_attention_backward": "pplplpl" + "pfppppp" + "lllli",
    "hone_paged_attention": "plppplppfp" + "llllli",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def functions() -> ctypes.CDLL:
    """The loaded kernels. Calls through it release the interpreter lock."""
    library = build.load()
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[kind] for kind in arguments]
        function.restype = {"hone_packed_size": ctypes.c_long, "hone_experts": ctypes.c_int}.get(name)
    return library


@functools.cache
def available() -> bool:
    """Whether the kernels compile and load here; the reason is logged when they do not."""
    reason = obstacle()
    if reason is not None:
        logger.warning("no native kernels: %s", reason)
    return reason is None


def obstacle() -> str | None:
    """Why the kernels do not compile or load here; None where they do."""
    try:
        functions()
    except (build.BuildError, OSError) as error:
        return str(error)
    return None
