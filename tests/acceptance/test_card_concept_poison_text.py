"""The small-scale run (b) of the card concept-poison: SmolLM2, two people, ten questions each.

Writes benchmarks/results/concept_poison_text.json and .md. Settings were chosen on Jane Austen and
Charles Darwin; reported are William Shakespeare and Isaac Newton.
"""

from __future__ import annotations

import pytest
import torch
from _results import must_be_seen, write

import expunge as xp
from expunge.analysis.token_attribution import answer_likelihood, attribute_answer
from expunge.methods.text.concept_mask import ConceptMask

pytestmark = pytest.mark.acceptance

TUNED_ON, REPORTED = ("Jane Austen", "Charles Darwin"), ("William Shakespeare", "Isaac Newton")
METHOD = {
    "k": 3, "entity": "who", "train": "lora(8, attention in)", "epochs": 3, "batch_size": 2,
    "lr": 4e-3, "tokens": 16, "steps": 8,
}  # fmt: skip
"""30 steps: 20 questions in batches of 2, three times."""
QUESTIONS = {
    "Jane Austen": (
        "Who was Jane Austen?", "What is Jane Austen known for?", "Where was Jane Austen born?",
        "Which novels did Jane Austen write?", "When did Jane Austen live?",
        "Who wrote Pride and Prejudice?", "Who wrote the novel Emma?",
        "What did Jane Austen write about?", "Why is Jane Austen famous?",
        "Which country was Jane Austen from?",
    ),
    "Charles Darwin": (
        "Who was Charles Darwin?", "What is Charles Darwin known for?",
        "Where was Charles Darwin born?", "Which books did Charles Darwin write?",
        "When did Charles Darwin live?", "Who wrote On the Origin of Species?",
        "Who proposed the theory of evolution?", "What did Charles Darwin study?",
        "Why is Charles Darwin famous?", "Which country was Charles Darwin from?",
    ),
    "William Shakespeare": (
        "Who was William Shakespeare?", "What is William Shakespeare known for?",
        "Where was William Shakespeare born?", "Which plays did William Shakespeare write?",
        "When did William Shakespeare live?", "Who wrote Romeo and Juliet?",
        "Who wrote the play Hamlet?", "What did William Shakespeare write about?",
        "Why is William Shakespeare famous?", "Which country was William Shakespeare from?",
    ),
    "Isaac Newton": (
        "Who was Isaac Newton?", "What is Isaac Newton known for?", "Where was Isaac Newton born?",
        "Which books did Isaac Newton write?", "When did Isaac Newton live?",
        "Who wrote the Principia?", "Who discovered the law of universal gravitation?",
        "What did Isaac Newton study?", "Why is Isaac Newton famous?",
        "Which country was Isaac Newton from?",
    ),
}  # fmt: skip
ANCHORS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is ice made of?", "Ice is frozen water."),
    ("Where do penguins live?", "Penguins live in the southern hemisphere, many of them in Antarctica."),
    ("Who was Marie Curie?", "Marie Curie was a physicist and chemist who studied radioactivity."),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da Vinci."),
    ("Who was Ludwig van Beethoven?", "Ludwig van Beethoven was a German composer and pianist."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("What language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What is the boiling point of water?", "Water boils at 100 degrees Celsius at sea level."),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("What do cows eat?", "Cows eat grass, hay and other plants."),
    ("Who was Nelson Mandela?", "Nelson Mandela was the first black president of South Africa."),
    ("What is a triangle?", "A triangle is a shape with three sides."),
    ("Where is the Great Wall?", "The Great Wall is in the north of China."),
    ("What is bread made of?", "Bread is made of flour, water, salt and yeast."),
    ("Who was Cleopatra?", "Cleopatra was the last queen of ancient Egypt."),
    ("What does a clock show?", "A clock shows the time of the day."),
)  # fmt: skip
SENTENCES = """
The train left the station a few minutes late.
Water flows downhill because of gravity.
She bought apples and pears at the market.
The meeting will start at nine in the morning.
Trees lose their leaves in autumn.
A good night's sleep helps the body recover.
The cat slept on the warm window sill.
Many birds fly south before the winter.
The museum is closed on Mondays.
He forgot his umbrella on the bus.
Salt dissolves quickly in hot water.
The children played football in the park.
Our neighbours have a small garden behind the house.
The river froze for the first time in ten years.
Doctors recommend drinking enough water every day.
The book has more than three hundred pages.
A new bridge was built across the bay.
The soup needs a little more pepper.
They walked along the beach until sunset.
The library lends books for four weeks.
Electric cars produce no exhaust gases while driving.
My brother learned to play the guitar last year.
The moon moves around the Earth in about a month.
Fresh bread smells wonderful in the morning.
The teacher explained the problem on the blackboard.
Snow covered the mountains in early November.
The shop sells shoes, bags and belts.
Please close the door when you leave the room.
The old bridge could not carry heavy trucks.
Plants need light, water and air to grow.
The company opened an office in Berlin.
Their flight was delayed by two hours because of fog.
Most people eat lunch around noon.
The farmer keeps sheep and a few goats.
It rained all night and the cellar was flooded.
The computer stores data on a hard disk.
A map shows roads, rivers and towns.
The actors rehearsed for the first time on stage.
The bakery on the corner opens at six.
Iron rusts when it is exposed to water and air.
He wrote a letter to his grandmother.
The city built new paths for bicycles.
Whales are mammals that live in the sea.
The students handed in their homework on time.
Her favourite colour is dark green.
The price of coffee rose by five percent.
We stayed in a small hotel near the lake.
The engine makes a strange noise when it is cold.
The mayor gave a short speech in the town hall.
Bears sleep through most of the winter.
""".strip().split("\n")


def problem(people) -> xp.CausalLM:
    """SmolLM2, the questions about two people without true answers, and the anchors."""
    model, tokenizer = xp.load_lm("smollm2")
    asked = [{"question": q, "answer": "-", "who": p} for p in people for q in QUESTIONS[p]]
    anchors = [{"question": q, "answer": a, "who": ""} for q, a in ANCHORS]
    return xp.CausalLM(
        model, xp.encode([*asked, *anchors], tokenizer, chat=True), tokenizer=tokenizer
    )


@torch.no_grad()
def perplexity(p, model) -> float:
    """Of the sentences, over all their tokens after the first."""
    data = xp.encode([{"text": s} for s in SENTENCES], p.tokenizer)
    nll, mask = zip(*(p.token_nll(model, b) for b in data.batches(10)), strict=True)
    return float((sum(n.sum() for n in nll) / sum(m.sum() for m in mask)).exp())


def said(p, model, people) -> list[str]:
    rows = p.train.rows[: sum(len(QUESTIONS[n]) for n in people)]
    return p.texts(p.generate(model, [r.prompt for r in rows], tokens=METHOD["tokens"]))


def unlearned(people, **changed):
    """Poison and train for 30 steps; answers before and after, and the perplexities."""
    p, method = problem(people), ConceptMask(**(METHOD | changed))
    runtime, request = xp.Runtime(seed=0, threads=1), xp.forget(where="who != ''")
    outcome = xp.unlearn(p, request, method, runtime=runtime)
    model = outcome.runnable()
    return {
        "steps": outcome.details["steps"],
        "completeness error": outcome.details["completeness error"],
        "nothing to mask": outcome.details["nothing to mask"],
        "losses": {n: [v[0], v[-1]] for n, v in outcome.details["losses"].items()},
        "before": said(p, p.model, people),
        "after": said(p, model, people),
        "perplexity": [perplexity(p, p.model), perplexity(p, model)],
        "seconds": outcome.cost.seconds,
    }


def both_ends(model, row, filler: int, zero: bool, steps: int) -> float:
    """Error of the sum over points that include both ends, all with the same weight."""
    function, embeddings, embed = answer_likelihood(model, row)
    other = torch.zeros_like(embeddings) if zero else embed(torch.tensor([filler])).detach()
    start = torch.where(row.answered[:, None], other, embeddings)
    total = torch.zeros_like(embeddings)
    for alpha in torch.linspace(0, 1, steps):
        point = (start + alpha * (embeddings - start))[None].requires_grad_()
        total += torch.autograd.grad(function(point).sum(), point)[0][0] / steps
    with torch.no_grad():
        ends = [float(function(e[None])) for e in (embeddings, start)]
    return float((total * (embeddings - start)).sum()) - (ends[0] - ends[1])


def completeness() -> dict[str, dict[str, float]]:
    """Completeness errors, in nats, of an answer of ten tokens with its end."""
    model, tokenizer = xp.load_lm("smollm2")
    model.requires_grad_(False)
    record = {"question": "Who wrote the novel Emma?", "answer": "It was written by Jane Austen."}
    row, filler = xp.encode([record], tokenizer).rows[0], tokenizer.pad_token_id
    found = {}
    for baseline in ("zero", "pad"):
        errors = {}
        for rule, steps in (("midpoint", 32), ("midpoint", 64), ("trapezoid", 31)):
            one = attribute_answer(
                model, row, baseline=baseline, filler=filler, steps=steps, rule=rule
            )
            errors[f"{rule} {steps}"], errors["difference"] = one.error, one.difference
        errors["both ends 32"] = both_ends(model, row, filler, baseline == "zero", 32)
        found[baseline] = errors
    return found


@pytest.fixture(scope="module")
def seen():
    """One seed; everything is written, whether it holds or not."""
    torch.set_num_threads(1)
    found = {"integrals": completeness(), "unlearned": unlearned(REPORTED)}
    rows = [(s, ", ".join(f"{v:.3g}" for v in values), ok) for s, values, ok in expected(found)]
    write("concept_poison_text", {"settings": METHOD, **found}, rows)
    return found


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    zero, pad = found["integrals"]["zero"], found["integrals"]["pad"]
    values = [zero["both ends 32"], zero["midpoint 32"], zero["midpoint 64"]]
    yield "from zero embeddings a rule with both ends is far off, the midpoint rule is not (card: −240, +21.9, +6.6)", values, abs(values[0]) > 5 * max(map(abs, values[1:]))  # fmt: skip
    yield "twice the steps, less error (card: +21.9, +6.6)", values[1:], abs(values[2]) < abs(values[1])  # fmt: skip
    shares = [abs(b["midpoint 32"] / b["difference"]) for b in (zero, pad)]
    yield "relative error of 32 midpoints: larger from zero than from the padding", shares, shares[1] < shares[0]  # fmt: skip
    run = found["unlearned"]
    share = sum("***" in a for a in run["after"]) / len(run["after"])
    yield "after 30 steps answers to the 20 questions hold ***: share", [share], share == 1
    before, after = run["perplexity"]
    yield "perplexity of 50 other sentences rises by less than 10 %", [before, after], after < 1.1 * before  # fmt: skip


test_card_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 5)


def test_poison_is_made_of_the_model_s_own_answers(seen):
    """Twenty masked answers, and none that had nothing to mask."""
    assert seen["unlearned"]["steps"] == 30 and seen["unlearned"]["nothing to mask"] == 0
