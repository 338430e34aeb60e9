"""Ctrl-C in a notebook: never between an update and its assignment."""

from collections.abc import Iterator
import contextlib
import signal
import threading


@contextlib.contextmanager
def held() -> Iterator[None]:
  """Delays Ctrl-C to the end of the block, where Python itself would raise it.

  Does nothing in other threads, or where SIGINT's handler is not Python's own.

  Raises:
    KeyboardInterrupt: at the end, if one came.
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
