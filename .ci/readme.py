"""Renew README's example and results: `python .ci/readme.py` asks, draws and writes; `--check` says whether they agree.

The example is asked anew; the figures come from data/runs/*.json, so that no number is ever typed.
"""

import json
import re
import sys
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
QUESTION = "product_q001959.wav"
CELLS = ("all", "seen wording, seen voice", "seen wording, new voice", "new wording, seen voice",
         "new wording, new voice", "seen wording, unseen slot", "facts only ever read")
COLUMNS = {
    "text": "text exact", "lenient": "spoken, lenient", "strict": "spoken, strict", "agrees": "speech = own text",
    "teacher_lenient": "ceiling, lenient", "teacher_strict": "ceiling, strict",
}


def run(name):
    path = ROOT / "data" / "runs" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def percent(entry):
    return "–" if entry["share"] is None else f"{100 * entry['share']:.1f}"


def source(result):
    return f"*{result['date']}, commit {result['commit']}, {result['hardware']}; `{result['command']}`*"


def section(name, write):
    """The lines that write(result) makes of a recorded result, and where that comes from; none if there is none."""
    result = run(name)
    return [*write(result), "", source(result), ""] if result else []


def accuracy(result):
    from aqaa.corpus.wider import HONEST, HONESTY
    from aqaa.evaluation.accuracy import share

    names = {name.replace("×", ","): name for name in result["summary"]}
    lines = ["**Accuracy**, percent, on questions that were never in training "
             f"({result['questions']} in all; the judge chooses among {result.get('grammar', '–')} sentences):", "",
             "| | n | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in names.values():
        scores = result["summary"][name]
        n = max(entry["n"] for entry in scores.values())
        lines.append(f"| {name} | {n} | " + " | ".join(percent(scores[key]) for key in COLUMNS) + " |")
    measured = [row for row in result.get("rows", ()) if row["manner_ok"] is not None]
    if measured:
        sung = share(row["manner_ok"] for row in measured if row["category"] == "Sing")
        said = [row for row in measured if row["category"] != "Sing"]
        one, two = (share(row["manner_ok"] for row in said if (" " in row["manner"]) == both) for both in (0, 1))
        lines += ["", f"Requested manner measured in the answer, right direction: {percent(one)} % of {one['n']}; of "
                  f"answers that change it in the middle, both manners in their places, {percent(two)} % of {two['n']} "
                  "(rules over rate, pitch and energy; the moods are rules too, not emotion); of songs, every note "
                  f"within a semitone, {percent(sung)} % of {sung['n']}."]
    if heard := result.get("open_judge"):
        errors = {name: "{error} % ({interval[0]}–{interval[1]}) of {words} words".format(**entry)
                  for name, entry in heard.items()}
        lines += ["", f"**Spoken answers, heard by Whisper base**, which knows no list of answers: {errors['answers']} "
                  f"are not those of the model's own text, in {heard['answers']['n']} answers; in the teacher's "
                  f"recordings {errors['teacher']}."]
    known = [row for row in result.get("rows", ()) if row["category"] != HONESTY]
    if known:
        refused = sum(row["written"] in HONEST for row in known)
        share = f"{100 * refused / len(known):.1f} %"
        lines += ["", f"Of {len(known)} questions with a known answer {refused} ({share}) got “I do not know that yet” "
                  "or “I did not hear you well”. The natural voices are Kokoro's and Piper's joe; none of them was "
                  "ever heard. Before a second turn the first question is spoken, too, and what the model makes of it "
                  "is the history. An unrelated second turn is a question of “seen wording” (seen or natural voice) "
                  "behind the first question of another dialogue. A question whose answer begins unsurely is heard "
                  "four times ([hearings.py](aqaa/hearings.py)), here and wherever the mini answers."]
    return lines


def systems(ours):
    """Nine ways to answer, on the same questions, and what they say to three claims of the article."""
    from aqaa.evaluation.agreement import compare
    from aqaa.lineage.registry import SYSTEMS

    runs = {name: found for name in SYSTEMS if (found := run(f"eval-{name}"))}
    lines = [f"**Systems**: `{ours['set']}`, nine categories, percent right (95 %), by `aqaa eval`. Each was trained "
             "for minutes on one thread, where its design allows from the shipped weights, which learnt for hours to "
             "answer as aqaa does: that favours it. All nine heard each question once. Gap: points that the sound is "
             "behind the text; word error: Whisper base against the system's own text.", "",
             "| | n | text | sound | gap | word error | first sound, s | work, s a second "
             "| parameters of its own, million | minutes of training |", "|---" * 10 + "|"]
    for name, found in runs.items():
        scores, own = found["summary"]["all"], found.get("trained") or {}
        clock = clock_of(found)
        shares = ["{share:g} ({interval[0]:g}–{interval[1]:g})".format(**scores[key]) for key in ("text", "spoken")]
        heard = "{error:g} ({interval[0]:g}–{interval[1]:g})".format(**scores["word_error"])
        lines.append("| " + " | ".join(map(str, (
            name, scores["text"]["n"], *shares, scores.get("gap", "–"), heard, clock.get("first", "–"),
            clock.get("rtf", "–"), own.get("parameters", "–"), own.get("minutes", "–")))) + " |")
    for score, title in (("text", "Text"), ("spoken", "Sound")):
        lines += ["", f"{title} right by category, percent:", "", "| | " + " | ".join(runs) + " |",
                  "|---" * (len(runs) + 1) + "|"]
        for category in list(ours["summary"])[1:]:
            cells = [found["summary"].get(category, {}).get(score, {}).get("share", "–") for found in runs.values()]
            lines.append(f"| {category} | " + " | ".join(map(str, cells)) + " |")

    lines += ["", "Question by question, text right only in one of two (McNemar), and κ of right and wrong:", ""]
    for name, found in runs.items():
        if name == "aqaa":
            continue
        told = compare(ours["rows"], found["rows"])["text"]
        voice = compare(*([row for row in one["rows"] if row["category"] == "Voice Understanding"]
                          for one in (ours, found))).get("text")
        about = "; about the voice {only_first} and {only_second} of {n}".format(**voice) if voice else ""
        lines.append(f"- {name}: {told['only_first']} only in aqaa, {told['only_second']} only in {name}, of "
                     f"{told['n']} ({told['difference']:+} points, {chance(told)}, κ {told['kappa']}){about}.")
    return lines + alike(runs) + noisy() + claims(ours, runs)


def chance(found):
    """The p value that `agreement.compare` found, as text."""
    return f"p {found['p']:g}" if found["p"] else "p < 0.0001"


def clock_of(found):
    """Times of a run: taken alone, where the whole run shared its machine."""
    return found.get("clock", found["summary"]["all"])


def alike(runs):
    """Whether two systems err on the same questions, for each two of them."""
    from aqaa.evaluation.agreement import compare

    told = {pair: compare(*(runs[name]["rows"] for name in pair))["text"] for pair in combinations(runs, 2)}
    names = list(runs)
    lines = ["", "Do they err on the same questions? κ of text right above the diagonal; below it the share of all "
             "errors of two that both make, percent:", "", "| | " + " | ".join(names) + " |",
             "|---" * (len(names) + 1) + "|"]
    for i, name in enumerate(names):
        cells = [told[other, name]["overlap"] for other in names[:i]]
        cells += ["–", *(told[name, other]["kappa"] for other in names[i + 1 :])]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return lines


def noisy():
    """What is left in noise of what each system answers right without, in text and in sound."""
    if not (result := run("noise")):
        return []
    levels = [level.replace("noise ", "") for level in next(iter(result["systems"].values()))["conditions"]]
    lines = ["", f"In noise, so many dB below the speech: text / sound right of the same {result['questions']} "
             "questions, percent, and in brackets what is still right of what was right when clean (the preserve rate, "
             "of text with its 95 %):", "", "| dB | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for name, found in result["systems"].items():
        cells = []
        for one in found["conditions"].values():
            cell = f"{one['text']['share']:.0f} / {one['spoken']['share']:.0f}"
            if kept := one.get("kept_text"):
                sound = f"{one['kept_spoken']['share']:.0f}" if "kept_spoken" in one else "–"
                cell += f" ({kept['share']:.0f}, {kept['interval'][0]:.0f}–{kept['interval'][1]:.0f}; {sound})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", source(result)]


def claims(ours, runs):
    """The article's three claims, with what was measured for and against them."""
    if "audiogpt" not in runs:
        return []
    from aqaa.evaluation.agreement import compare

    cascade = runs["audiogpt"]
    told = compare(ours["rows"], cascade["rows"])["text"]
    sides = "more" if told["difference"] > 0 else "less"
    sure = "sure" if told["p"] < 0.05 else "not sure"
    mine, theirs = (clock_of(one)["first"] for one in (ours, cascade))

    def share(run, category, score):
        found = run["summary"].get(category, {}).get(score)
        return "–" if found is None else "{share:g} ({interval[0]:g}–{interval[1]:g})".format(**found)

    voice = " against ".join(share(one, "Voice Understanding", "text") for one in (ours, cascade))
    manner = " against ".join(share(one, "Speech Emotion Control", "manner") for one in (ours, cascade))
    points = abs(told["difference"])
    return ["", f"Three claims. *Errors pile up in cascades*: on the same {told['n']} questions one network is right "
            f"{points} points {sides} often than AudioGPT, which is {sure} ({chance(told)}){at_ten()}. *Unified is "
            f"faster*: first sound after {mine:g} s against {theirs:g} s. *Cascades lose expression*: of questions "
            f"about the voice {voice} percent are right, AudioGPT by its describer, a tool at the edge that passes on "
            f"words; of manners that are measured in the answer, {manner} percent."]


def at_ten():
    """What the first claim says of noise: of what is right when clean, how much is right 10 dB above it."""
    if not (result := run("noise")):
        return ""
    aqaa, cascade = ("{share:.0f} ({interval[0]:.0f}–{interval[1]:.0f})".format(
        **result["systems"][name]["conditions"]["noise 10"]["kept_text"]) for name in ("aqaa", "audiogpt"))
    return f"; 10 dB above noise {aqaa} percent of what it had right is left, of AudioGPT's {cascade}"


PAPER = {  # Chat, Relevance, Factuality by GPT-4o, of the paper's Tables 1 and 2
    "layouts": {"audio_only": (1.72, .05, .03), "ratio_6_50": (1.20, .04, .05), "ratio_3_5": (1.03, .00, .00),
                "text_cot": (4.01, .59, .58), "ratio_10_15": (4.03, .65, .67)},
    "joins": {"pre_interleaved": (3.82, .54, .59), "marker_removal": (4.08, .56, .57),
              "marker_preserving": (4.22, .57, .57)},
}  # fmt: skip
TITLES = {
    "layouts": "**Layouts of text and sound** (the paper's Table 1, and five of its neighbours)",
    "joins": "**Joining voice states** (the paper's Table 2): manners that change in mid-sentence",
    "codebooks": "**Two codebooks or one** (paper 2.1), each trained from nothing: nats a code, given those before it",
    "preference": "**Preference training** (the paper's Eq. 2 is text_masked)",
    "merge": "**Merging** (the paper's Eq. 3 is 5:5:1)",
}


def ablation(name):
    """A section of a recorded ablation: mean over seeds, with intervals, beside the paper's figures."""
    from aqaa.training.ablations import cell, summary

    def write(result):
        rows, paper = summary(result["runs"]), PAPER.get(name, {})
        figures = list(next(iter(rows.values())))
        heads = ["", "seeds", *(figure.replace("_", " ") for figure in figures)]
        heads += ["paper: Chat", "Relevance", "Factuality"] if paper else []
        lines = [f"{TITLES[name]}, percent (seconds and nats apart), ± 95 % over seeds; {result['questions']} "
                 "questions of the development split a run.", ""]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for variant, values in rows.items():
            seeds = sum(row["variant"] == variant for row in result["runs"])
            cells = [cell(figure, *value) for figure, value in values.items()]
            cells += [f"{value:g}" for value in paper.get(variant, ())] or ["–"] * (3 if paper else 0)
            lines.append(f"| {variant} | {seeds} | " + " | ".join(cells) + " |")
        return lines + (merged(result["runs"], rows) if name == "merge" else [])
    return section(f"ablation-{name}", write)


def merged(runs, rows):
    """The lines that say which merge is best, and how well it, the parents and the paper's mean do in each skill."""
    from aqaa.training.ablations import by_skill, cell

    best = max(rows, key=lambda variant: rows[variant]["text"])
    names = {best: best, "4:0:0": "SFT-1", "0:4:0": "SFT-2", "0:0:4": "DPO", "5:5:1": "5:5:1"}
    skills = by_skill(runs)
    first, shipped = (cell("text", *rows[variant]["text"]) for variant in (best, "4:0:0"))
    lines = ["", f"Shares of SFT-1 : SFT-2 : DPO. Best in text: {names[best]}, {first}; shipped: SFT-1, {shipped}. "
             "Text right by skill, percent:", ""]
    lines += ["| | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {skill} | " + " | ".join(f"{100 * skills[name][skill]:.1f}" for name in names) + " |"
                    for skill in skills[best]]


def calibration(result):
    error, before = result["error"], result["before"]
    interval = f"{error['low']:.1f} to {error['high']:.1f}"
    return ["**How sure it is**: on the average of ten bins its confidence is off by "
            f"{error['points']:.1f} points (95 %: {interval}; the bare mean probability of its words by "
            f"{before['points']:.1f}), on {result['measured_on']:,} evaluation questions of all kinds. Two numbers "
            f"were fitted to {result['fitted_on']} others."]


def judges(result):
    """How far four judges of the same spoken answers agree, and what each says of right answers."""
    told = result["judge"]
    ceiling, name, side = told["ceiling"], told["name"], told["agreement"]
    taught = run("accuracy")
    closed, opened = taught["summary"]["all"]["teacher_lenient"], taught["open_judge"]["teacher"]
    lines = [f"**Judges**: Cohen's κ (95 % of draws) of each two judges of {result['questions']} spoken answers: the "
             "rule on what was written, pocketsphinx on a closed list, Whisper base on anything, word for word, and a "
             f"language model ({name}) that grades factuality 4 or 5 of 5; {told['unparsed']} of its "
             f"{told['verdicts']} verdicts did not parse. By its grade a right answer stands above a wrong one in "
             f"{side['text']['ranked']} % of pairs as text and {side['speech']['ranked']} % as Whisper heard it (50 is "
             f"chance). Ceilings: of the *right* answers it grades {ceiling['share']:.0f} % (n = {ceiling['n']}) 4 or "
             f"5; of the teacher's recordings pocketsphinx hears {100 * closed['share']:.1f} % right (n = "
             f"{closed['n']}), Whisper {opened['error']} % of the words wrong (n = {opened['n']} recordings).", "",
             "| judges | n | κ |", "|---|---|---|"]
    for pair, row in told["judges"].items():
        interval = "" if row["kappa"] is None else " ({:.2f}–{:.2f})".format(*row["interval"])
        lines.append(f"| {pair} | {row['n']} | {'–' if row['kappa'] is None else row['kappa']}{interval} |")
    return lines


SEEN = {"picture_seen": "in wordings and voices of the training", "picture_new": "in wordings never heard",
        "picture_natural": "in natural voices never heard", "count": "how many",
        "count_some": "how many, where there are some", "colour": "which colour",
        "shape": "which shape", "digit": "which number", "where": "where", "is_there": "is there one"}


def pictures(result):
    """Shares of right answers about drawn pictures, by cell and by kind of question."""
    lines = ["**Pictures**: spoken questions about drawn pictures that no training drew, in text and as an ear hears "
             "the answer, percent ± standard error; beside it how often what it says of *another* picture would be "
             "right of this one.", "", "| question | n | text | sound | other picture |", "|---|---|---|---|---|"]
    for name, label in SEEN.items():
        cells = [f"{100 * one['share']:.0f} ± {100 * one['error']:.0f}" for one in result["cells"][name].values()]
        lines.append(f"| {label} | {result['cells'][name]['text']['n']} | {' | '.join(cells)} |")
    return lines


CHANGED = ("noise 20 dB", "noise 10 dB", "noise 5 dB", "telephone", "mp3")
FAMILIES = {"seen": "voices of the training", "other": "other synthesizers",
            "natural": "natural voices of the corpus (Kokoro, hibari)",
            "kokoro": "Kokoro, held out", "styles": "four English styles, held out", "joe": "Piper's joe, held out",
            "commands": "people: orders in a shop", "librivox": "people: reading", "cards": "people: card games",
            "asterisk": "people: telephone prompts, 8 kHz", "digits": "people: digits, 8 kHz",
            "klettres": "people: single letters"}


def hearing(result):
    """Phone errors and codes that stay: families as rows, every recorded entry a column of each tokenizer."""
    entries = {label: part for label, part in result.items() if isinstance(part, dict)}
    ears = ("linguistic", "semantic")
    heads = [f"{ear}, {label}" for ear in ears for label in entries]
    *_, newest = entries.values()
    lines = ["**Whom the ears hear**: phones wrong, missing or too many, percent (95 % of draws of as many clips), "
             "read from the linguistic encoder and from the semantic codes; “before”: the ears that knew the voices of "
             "the first rows alone, “steady”: after they went on with natural voices, their codebooks kept.", "",
             f"| | clips | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name in sorted(newest["phone_error"], key=lambda name: list(FAMILIES).index(name.split(",")[0])):
        family, _, kind = name.partition(", ")
        rows = [(entry["phone_error"].get(name), ear) for ear in ears for entry in entries.values()]
        cells = ["{} ({}–{})".format(row[ear]["error"], *row[ear]["interval"]) if row else "–" for row, ear in rows]
        clips = newest["phone_error"][name]["n"]
        lines.append(f"| {FAMILIES[family]}{', ' if kind else ''}{kind} | {clips} | {' | '.join(cells)} |")
    for label, entry in entries.items():
        kept = entry["agreement"]
        told = {ear: " / ".join(f"{kept[way][ear]:.0f}" for way in CHANGED) for ear in ears}
        lines += ["", f"Codes that stay ({label}) under noise of 20 / 10 / 5 dB, over a telephone line / as MP3: "
                  f"linguistic {told['linguistic']}, semantic {told['semantic']} %."]
    return lines


def table(result, title, rows):
    lines = [f"**{title}**", "", "| | |", "|---|---|"]
    for key, label in rows.items():
        value = result
        for part in key.split("."):
            value = value[part]
        lines.append(f"| {label} | {value if not isinstance(value, float) else f'{value:.3g}'} |")
    return lines


def parts(result):
    """Every part at the published size, beside the packages it can be compared with."""
    lines = ["**Every part at its published size**, random weights, fp32 where nothing else is said: CPU-seconds of "
             "one thread for a second of sound, measured in turns with others (as trained: our module before "
             "`fast.prepare`, weight norms unfolded; AMX: `--amx`, linear layers on the matrix units of a Xeon, "
             "each fp32 product as three of bf16, within the tolerance of the golden tensors).", "",
             "| part | sound, s | aqaa | others | times faster |", "|---|---|---|---|---|"]
    for row in result["parts"]:
        if "aqaa" not in row.get("cpu", {}):
            continue
        others = ", ".join(f"{name} {value:.3g}" for name, value in row["cpu"].items() if name != "aqaa")
        faster = ", ".join(f"{value:.2f} ({name})" for name, value in row["times_faster"].items())
        lines.append(f"| {row['part']} | {row['seconds']} | {row['cpu']['aqaa']:.3g} | {others} | {faster} |")
    return lines


def quantized(result):
    """What fewer bits do to the mini's answers."""
    first = next(iter(result["formats"].values()))
    lines = [f"**Fewer bits**: the mini's answers to {first['questions']['n']} evaluation questions, text.", "",
             "| weights | likeliest id the same | right, of what the unquantised had right | right in all |",
             "|---|---|---|---|"]
    for name, found in result["formats"].items():
        shares = found["scores"]["agreement"], found["questions"]["kept"], found["questions"]["right"]
        lines.append(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return lines


def whole_tests(result):
    """How long all tests take, where."""
    yield "**All tests**, two workers on two cores, in a fresh clone and a fresh environment:"
    yield from ["", "| Python | versions | processor | passed | failed | minutes |", "|---|---|---|---|---|---|"]
    for run in result["runs"]:
        yield "| " + " | ".join(str(run[key]) for key in (
            "python", "versions", "processor", "passed", "failed", "minutes")) + " |"  # fmt: skip


def full_size(result):
    """What one GPU did with random weights of the published size."""
    yield "**The published size on one GPU**, 131.9 B random weights in four bits, one listener:"
    yield from ["", "| | |", "|---|---|"]
    yield f"| plain copy, read and written, GB a second | {result['copy_gb_per_s']:,.0f} |"
    for point in result["decode"]:
        share = f"{100 * point['step_share_of_copy']:.0f} % of the copy's rate"
        step = f"a step of {point['step_ms']:.1f} ms reads at {share}"
        yield f"| ids a second after {point['context']:,} ids ({step}) | {point['tokens_per_s']:.1f} |"
    yield f"| the same in fp8 | {result['fp8']['decode'][-1]['tokens_per_s']:.1f} |"
    yield f"| reading a prompt of {result['prefill'][0]['ids']} ids, s | {result['prefill'][0]['seconds']:.2f} |"
    asked = result["ask"]
    yield f"| first sound after a question of {asked['question_s']:g} s, s | {asked['first_audio_s']:.2f} |"
    yield f"| real-time factor of the vocoder | {result['vocoder']['rtf']:.3f} |"
    yield from ["", f"Measured with {result['note']}."]


def minutes(stage):
    """Of a stage and of the runs that it continues."""
    return stage["seconds"] / 60 + (minutes(stage["continues"]) if "continues" in stage else 0)


def turns(result):
    """Simulated conversations, idle and busy, with and without speculation."""
    found, busy = {"idle": result}, run("turns-busy")
    if busy:
        found["busy"] = busy
    n = result["with speculation"]["turns"]
    lines = [f"**Turns**: {n} simulated ones, of the shipped questions, with pauses, noise and interruptions; from "
             "the end of speech to the first sound of the answer, of which the controller waits 0.7 s to be sure "
             "that a turn has ended (busy: beside an endless loop on every core).", "",
             "| cores | speculation | median, s | 95 %, s | saved, median ms | lost | cut short in a hesitation "
             "| interruptions heard | coughs taken for one |", "|---" * 9 + "|"]
    for name, record in found.items():
        for kind in ("with", "without"):
            row = record[f"{kind} speculation"]
            used = f"{row['counts']['used']} of {row['counts']['speculations']} used" if kind == "with" else "none"
            saved = f"{row['saved_ms_median']:.0f} (n = {row['saved_n']})" if kind == "with" else ""
            of = [f"{round(row[key]['share'] * row[key]['n'])} of {row[key]['n']}"
                  for key in ("cut_questions", "barge_ins_heard", "wrong_interruptions")]
            seconds = [f"{row[f'latency_{key}_s']:.2f}" for key in ("median", "95")]
            lines.append("| " + " | ".join(map(str, (name, used, *seconds, saved, row["lost"], *of))) + " |")
    return [*lines, "", source(busy)] if busy else lines


def long_conversation(result):
    """One conversation of half an hour: what is lost, what grows, what drifts."""
    row = result["one conversation"]
    (early, late), (first, last) = row["memory_mb"], row["latency"]
    cuts, barged = row["cut_questions"], row["barge_ins_heard"]
    most = max(turn["memory_mb"] for turn in result["rows"]["with"])
    load = f" (load {row['load'][1]:.1f} by other programs and it)" if row["load"] else ""
    return [f"**One conversation of {row['turns']} turns**, {row['minutes']:.0f} simulated minutes{load}: "
            f"{row['lost']} lost, {round(barged['share'] * barged['n'])} of {barged['n']} interruptions heard, "
            f"{row['interruptions_by_nobody']} by nobody, {round(cuts['share'] * cuts['n'])} of {cuts['n']} "
            f"hesitations taken for the end; its clock {abs(row['drift_s']):.3f} s from the sound; "
            f"{early:.0f} MB in memory at the 21st to 40th turn, {late:.0f} in the last 20 "
            f"({row['memory_growth_percent']:+.1f} %), {most:.0f} at most; first sound after "
            f"{first:.2f} s in the first 20, {last:.2f} s in the last; the history never longer "
            f"than {row['history_ids_most']:,} ids."]


def results():
    def numbers(name, title, rows):
        return section(name, lambda result: table(result, title, rows))

    lines = section("accuracy", accuracy) + section("calibration", calibration) + section("eval-aqaa", systems)
    lines += section("judges", judges) + section("pictures", pictures) + section("hearing", hearing)
    for name in TITLES:
        lines += ablation(name)
    lines += numbers("synthesis", "Vocoder alone: true codes of answers that it never saw, spoken", {
        "n": "answers, each spoken four times", "lenient": "heard right, lenient",
        "teacher_lenient": "teacher's own wavs",
        "strict": "heard right, strict", "teacher_strict": "teacher's own wavs, strict",
        "mel_cepstral_distance_db": "mel-cepstral distance, dB", "f0_semitones": "f0 error, semitones"})
    lines += numbers("codes", "Codes", {
        "linguistic.perplexity": "linguistic: perplexity of 512",
        "semantic.perplexity": "semantic: perplexity of 1,024",
        "next_code_perplexity.linguistic.linguistic": "next linguistic code, alone",
        "next_code_perplexity.interleaved.linguistic": "next linguistic code, interleaved",
        "next_code_perplexity.semantic.semantic": "next semantic code, alone",
        "next_code_perplexity.interleaved.semantic": "next semantic code, interleaved"})
    lines += numbers("speed", "Speed", {
        "answer_s": "length of the answers, s", "real_time_factor": "real-time factor, ask",
        "stream_first_audio_s": "first sound, s", "stream_first_audio_share": "share of the answer generated by then",
        "ask_cold_to_wav_s": "`aqaa ask` from cold to written wav, s", "import_torch_s": "`import torch`, in turns, s",
        "import_aqaa_s": "`import aqaa`, s", "tokens_per_s": "tokens a second", "peak_memory_mb": "peak memory, MB",
        "busy_loops": "other programs' endless loops on the cores when busy",
        "busy.real_time_factor": "real-time factor, ask, busy", "busy.stream_first_audio_s": "first sound, busy, s",
        "busy_over_idle": "an answer when busy, times as long"})
    lines += section("turns", turns) + section("turns-long", long_conversation)
    lines += section("parts", parts) + section("quantize", quantized) + section("h200-130b-int4", full_size)
    lines += section("tests", whole_tests)
    record = ROOT / "data" / "mini" / "record.json"
    if record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        stages = {k: v for k, v in known.items() if isinstance(v, dict) and "seconds" in v}
        lines += ["**Training** of the shipped weights, minutes on one thread each: " + ", ".join(
            f"{name} {minutes(stage):.0f}" for name, stage in stages.items()) + "."]
    return "\n".join(lines)


def example():
    import aqaa

    questions = json.loads((ROOT / "data/questions/questions.json").read_text(encoding="utf-8"))
    entry = next(e for e in questions if e["file"] == QUESTION)
    answer = aqaa.load("mini").ask(str(ROOT / "data/questions" / QUESTION))
    answer.save(ROOT / "data/example_answer.wav")
    draw(entry, answer)
    return "\n".join([
        f"> **Question** ([wav](data/questions/{QUESTION}), a voice not heard in training): “{entry['transcript']}”  ",
        f"> **Answer** ([wav](data/example_answer.wav), {answer.seconds:.1f} s): “{answer.text}”", "",
        f"![Spectrograms of the question, {entry['transcript']}, and the answer, {answer.text}: "
        "frequency over time](data/example.png)", ""])


def draw(entry, answer):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import soundfile

    question, rate = soundfile.read(ROOT / "data/questions" / QUESTION)
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained", sharey=True)
    for axis, wav, hz, title in ((axes[0], question, rate, f"question: “{entry['transcript']}”"),
                                 (axes[1], answer.audio.numpy(), answer.sample_rate, f"answer: “{answer.text}”")):
        wav = wav + 1e-7 * np.random.default_rng(0).standard_normal(len(wav))  # silence has no logarithm
        axis.specgram(wav, NFFT=512, noverlap=384, Fs=hz, cmap="cividis", vmin=-130, vmax=-40)
        axis.set(title=title, xlabel="time, s", ylim=(0, 8000))
    axes[0].set_ylabel("frequency, Hz")
    figure.savefig(ROOT / "data/example.png", dpi=90)


def replace(text, name, content):
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return marked.sub(lambda m: m[1] + content.rstrip("\n") + "\n" + m[2], text)


def main():
    path = ROOT / "README.md"
    text = replace(path.read_text(encoding="utf-8"), "results", results())
    if "--check" in sys.argv:
        same = text == path.read_text(encoding="utf-8")
        return 0 if same else "README's results are not those of data/runs: run python .ci/readme.py"
    path.write_text(replace(text, "example", example()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
