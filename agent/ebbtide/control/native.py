"""Blocking native calls off the event loop, with their errors in our tree."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ebbtide import _native
from ebbtide.errors import InternalError
from ebbtide.rpc.failure import from_native

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


def _defect(panic: BaseException) -> InternalError:
    return InternalError(
        f"native code failed: {panic}", hint="this is a defect; the agent's log has the details"
    )


class NativeThread:
    """One thread of its own for the calls of one object: they run in the order they were made."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` on the thread. Raises `EbbError`s.

        A call that was begun runs to its end even if the caller is cancelled.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._executor, lambda: function(*args, **kwargs)
            )
        except _native.NativeError as error:
            raise from_native(error) from None
        except _native.PanicException as panic:
            raise _defect(panic) from None

    def close(self) -> None:
        """Let what is running end; take nothing more."""
        self._executor.shutdown(wait=False)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a native call that stands alone. Raises `EbbError`s."""
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except _native.NativeError as error:
        raise from_native(error) from None
    except _native.PanicException as panic:
        raise _defect(panic) from None
