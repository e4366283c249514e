"""The table of the training stages, in the order in which `aqaa train all` runs them.

A new stage is an entry here and the file of its task; the command line, the order, the parents,
what is exported and the keys of record.json follow. Nothing heavy is imported."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    task: "module:Class" of what is trained; Class.from_run(run, stage) makes it (see loop.py for
    what a task has). Without a task the work is the method of `run.Run` that has the stage's name.
    """

    name: str  # also of its checkpoint, its log and its entry in record.json
    help: str
    task: str = ""
    steps: int = 0  # all stages together: about ten hours of one thread
    part: str = ""  # of a model folder; where several stages make it, the last one is exported
    parent: str = ""  # the stage whose weights this one starts from
    mixture: dict = field(default_factory=dict)  # share of each kind of example (examples.py)
    floor: float = 0.02  # share of the learning rate that is left at the end
    settings: dict = field(default_factory=dict)  # further arguments of the task
    exported: bool = True  # False: a candidate, which `export` takes only if a table says so


SPEECH = "aqaa.training.speech_tokenizers"
STEADY = "aqaa.training.steady"
HEADS = "aqaa.training.heads"
VOCODER = "aqaa.training.flow_and_hift"
LANGUAGE = "aqaa.training.objectives:LanguageTask"
SIGHT = "aqaa.training.sight"
TURNS = "aqaa.training.turns"
PREFERENCE = "aqaa.training.preference:PreferenceTask"
OUTER = {"lr": 5e-4, "outer": 5.0}  # embeddings and head learn five times as fast as the trunk
TABLE = (
    Stage("corpus", "plan every utterance and speak it"),
    Stage("features", "compute what the audio tokenizers read"),
    Stage("linguistic", "CTC, then k-means", f"{SPEECH}:LinguisticTask", 4400, "linguistic"),
    Stage("semantic", "CTC through a quantiser", f"{SPEECH}:SemanticTask", 2700, "semantic"),
    Stage("steady_linguistic", "more voices, the same codes", f"{STEADY}:SteadyLinguistic", 1500,
          "linguistic", "linguistic"),
    Stage("steady_semantic", "more voices, the same codes", f"{STEADY}:SteadySemantic", 1500,
          "semantic", "semantic"),
    Stage("codes", "store both code sequences of every utterance"),
    Stage("heads", "phones that both tokenizers hear", f"{HEADS}:HeadsTask", 1500, "heads"),
    Stage("hift", "mel to wave", f"{VOCODER}:HiftTask", 2400, "hift"),
    Stage("flow", "codes to mel", f"{VOCODER}:FlowTask", 6300, "flow"),
    # Pre-training in three stages (paper 3.1; Step-Audio 4.1 has the shares). Pictures come last
    # here, after all else ("sight"), so their shares go to the others.
    Stage(
        "pretrain_audio", "the backbone reads, and goes on with speech", LANGUAGE, 300, "backbone",
        mixture={"next": 0.67, "text": 0.33}, floor=0.5, settings=OUTER,
    ),
    Stage(
        "pretrain_joined", "and reads on where speech ends", LANGUAGE, 300, "backbone",
        "pretrain_audio", mixture={"next": 0.335, "joined": 0.335, "text": 0.33}, floor=0.5,
        settings=OUTER,
    ),
    Stage(
        "pretrain", "and recognises and speaks", LANGUAGE, 1500, "backbone", "pretrain_joined",
        mixture={"next": 0.15, "joined": 0.15, "asr": 0.15, "tts": 0.15, "text": 0.25,
                 "tqaa": 0.15},
        floor=0.3,  # the next stage goes on from a rate that is still high
    ),
    Stage(
        "sft1", "the backbone answers spoken questions", LANGUAGE, 5000, "backbone", "pretrain",
        mixture={"aqtaa": 0.32, "aqta": 0.22, "turns": 0.19, "asr": 0.06, "text": 0.02,
                 "tqaa": 0.03, "tts": 0.16},
    ),
    Stage(
        "sft2", "selected spoken answers: stable format, special skills", LANGUAGE, 600, "backbone",
        "sft1", mixture={"aqtaa": 1.0}, settings={"selected": True, "heard": 0.0, "lr": 2e-4},
        exported=False,
    ),
    Stage("pairs", "pairs of a better and a worse answer", parent="sft1"),
    Stage(
        "dpo", "preference for the better answer, in text", PREFERENCE, 300, "backbone", "sft1",
        settings={"objective": "text_masked", "beta": 0.1}, exported=False,
    ),  # not from sft2, which gains some skills and hurts others (paper 3.3)
    Stage(
        "merge", "the mean of sft1, sft2 and dpo, 5:5:1", part="backbone", parent="sft1",
        settings={"parents": ("sft1", "sft2", "dpo"), "weights": (5, 5, 1)}, exported=False,
    ),
    Stage("vision", "names what a drawn picture holds", f"{SIGHT}:VisionTask", 3000, "vision"),
    Stage("sight", "the backbone answers questions about pictures", f"{SIGHT}:SightTask", 3700,
          "vision", "vision",
          mixture={"read": 0.55, "written": 0.2, "spoken": 0.18, "aqtaa": 0.07}),
    Stage("turns", "the backbone answers second questions in any words", f"{TURNS}:TurnsTask", 2000,
          "turns", mixture={"turns": 1.0}, settings={"heard": 0.0, "rows": 8, "follows": 0.55}),
    Stage("export", "gather the parts into a model folder"),
)  # fmt: skip
STAGES = {stage.name: stage for stage in TABLE}
ANSWERS = {"aqtaa": 0.75, "aqta": 0.10, "asr": 0.08, "tts": 0.07}
EVERY_LAYOUT = "aqaa.training.arrangements:EveryLayout"
GENTLE = {"lr": 5e-4}
OTHERS = {stage.name: stage for stage in (  # of the ablations alone
    # What variants start from: sft1 was taught one layout, this one all of them in equal shares.
    Stage("parent", "answers in any layout", EVERY_LAYOUT, 1500, "backbone", "sft1", ANSWERS, 0.3,
          GENTLE),
    Stage("layouts", "answers in one layout", LANGUAGE, 300, "backbone", "parent", ANSWERS,
          settings=GENTLE),
    Stage("joins", "joins manners in one way", LANGUAGE, 300, "backbone", "parent", ANSWERS,
          settings=GENTLE),
    Stage("codebooks", "learns from one codebook or both",
          "aqaa.training.arrangements:Fresh", 1200, "backbone",
          mixture={"next": 0.30, "asr": 0.20, "aqta": 0.15, "aqtaa": 0.35}),
)}  # fmt: skip
ABLATIONS = ("layouts", "joins", "codebooks", "preference", "merge")


def named(name):
    """The stage of that name, of the table or of the ablations."""
    return STAGES.get(name) or OTHERS[name]


def makers(trained=()):
    """{part of a model folder: the stage whose weights are exported}: the last of several, or of
    those among them that have `trained`."""
    stages = [stage for stage in STAGES.values() if stage.part and stage.exported]
    stages.sort(key=lambda stage: stage.name in trained)  # a stable sort: the last one counts
    return {stage.part: stage.name for stage in stages}


def names():
    """What can be asked for: every stage, and "all" of them in order."""
    return (*STAGES, "all")


def described():
    """The stages and what each does, one a line."""
    return "\n".join(f"  {name:<10}  {stage.help}" for name, stage in STAGES.items())
