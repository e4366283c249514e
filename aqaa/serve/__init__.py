"""`aqaa serve`: the model behind the interfaces that other software speaks, OpenAI's names of them.

`worker` owns the model and the line before it, `sound` turns bytes to samples and back, `requests`
answers /v1/audio/speech and /v1/chat/completions, `realtime` a WebSocket, `guard` asks for a token
and keeps to limits, `app` puts all together, and `talk.html` is a page with a microphone, whose
script `live.js` a notebook's widget has too. It needs `pip install 'aqaa[serve]'`."""


def ready(host, token):
    """The module that serves. Raises ValueError for such a host, and without its packages."""
    try:
        from aqaa.serve import app
    except ModuleNotFoundError as fault:
        if (fault.name or "").startswith("aqaa"):
            raise
        raise ValueError(f"{fault.name} is missing: pip install 'aqaa[serve]' brings it.") from None
    app.check_host(host, token)
    return app
