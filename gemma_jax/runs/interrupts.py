"""Ctrl-C in a notebook: never between an update and its assignment."""

from collections.abc import Iterator
import contextlib
import signal
import threading


@contextlib.contextmanager
def held() -> Iterator[None]:
  """Ctrl-C waits until the block is over, where Python itself would raise it.

  In other threads, and where somebody handles the signal, nothing changes.

  Raises:
    KeyboardInterrupt: at the end, if it came.
  """
  in_main = threading.current_thread() is threading.main_thread()
  if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    yield
    return
  came = []
  signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  if came:
    raise KeyboardInterrupt
