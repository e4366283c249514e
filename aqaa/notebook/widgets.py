"""What a notebook does with a reader at the keyboard: record, listen, look, steer, compare, judge.

Nine widgets, each twice: with interactive=True on a JupyterLab page; with interactive=False,
without a front end or JavaScript, as players, figures and tables of `show`. Show a widget in one
cell and use what it holds in the next: a page is not heard while a cell runs."""

from aqaa.notebook.conversing import Conversation
from aqaa.notebook.explore import Interleave, Ode, Tokens, VoiceControl
from aqaa.notebook.listening_test import Listening
from aqaa.notebook.planner import Planner
from aqaa.notebook.talk import Player, Recorder

__all__ = ["Conversation", "Interleave", "Listening", "Ode", "Planner", "Player", "Recorder",
           "Tokens", "VoiceControl"]  # fmt: skip
