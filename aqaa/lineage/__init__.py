"""The systems that led to Step-Audio-AQAA, at mini size on one interface (AQAA paper, section 5).

One file a system; `registry` names them all."""
