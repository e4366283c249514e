"""aqaa: Step-Audio-AQAA, readable and trainable. Spoken question in, spoken answer out.

    import aqaa
    model = aqaa.load("mini")
    answer = model.ask("question.wav")
    answer.save("answer.wav")

`__all__` lists what this package exports. Importing it loads nothing heavy: torch comes with the
first name that needs it.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["AQAA", "Answer", "AudioError", "ModelError", "Piece", "ask", "load"]

_HOMES = {
    "AQAA": "pipeline", "Answer": "answer", "Piece": "answer", "load": "loading",
    "AudioError": "sound_headers", "ModelError": "files",
}  # fmt: skip


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'aqaa' has no attribute {name!r}")
    return getattr(import_module(f"aqaa.{_HOMES[name]}"), name)


def ask(question, source="mini", **sampling):
    """`load(source).ask(question, **sampling)`: one Answer. Keep the model for more questions."""
    return __getattr__("load")(source).ask(question, **sampling)
