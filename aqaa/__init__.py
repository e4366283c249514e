"""aqaa: Step-Audio-AQAA, readable and trainable. A spoken question goes in, a spoken answer comes out.

    import aqaa
    model = aqaa.load("mini")
    answer = model.ask("question.wav")
    answer.save("answer.wav")

Importing this package loads nothing heavy: torch comes with the first name that needs it.
"""

__version__ = "0.1.0"
__all__ = ["AQAA", "Answer", "AudioError", "ModelError", "Piece", "ask", "load"]

_HOMES = {
    "AQAA": "pipeline",
    "Answer": "answer",
    "Piece": "answer",
    "AudioError": "sound_headers",
    "ModelError": "files",
    "load": "loading",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'aqaa' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"aqaa.{_HOMES[name]}"), name)


def ask(question, source="mini", **sampling):
    """One question, one Answer: `load(source).ask(question, **sampling)`. Keep the model for a second question."""
    from aqaa.loading import load

    return load(source).ask(question, **sampling)
