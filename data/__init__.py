"""Ctrl-C ends a script at once while it imports torch, whose modules may swallow an exception: `run` in files.py."""
import signal
import sys

if sys.argv[0].endswith(("sample.py", "train.py", "tokenizer.py")):  # not where this is a library
    signal.signal(signal.SIGINT, signal.SIG_DFL)
