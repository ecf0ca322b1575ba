"""Small real problems with their recipes. `workloads.registry.get("mnist-class").problem()`."""

from __future__ import annotations

from expunge.core.registry import Registry

registry = Registry(
    "workload",
    {
        "digits-class": "expunge.workloads.digits:digits_class",
        "mnist-class": "expunge.workloads.mnist:mnist_class",
        "mnist-random": "expunge.workloads.mnist:mnist_random",
        "mnist-mislabelled": "expunge.workloads.mislabelled:mnist_mislabelled",
        "diabetes-range": "expunge.workloads.diabetes:diabetes_range",
        "digits-range": "expunge.workloads.digits_range:digits_range",
        "digits-poison": "expunge.workloads.corrupted:digits_poison",
        "digits-confusion": "expunge.workloads.corrupted:digits_confusion",
        "digits-people": "expunge.workloads.people:digits_people",
        "tinyfacts": "expunge.workloads.tinyfacts:tinyfacts",
        "tinyfacts-quick": "expunge.workloads.tinyfacts:tinyfacts_quick",
        "authors": "expunge.workloads.open_data:authors",
        "authors-smollm2": "expunge.workloads.authors_smollm2:authors_smollm2",
        "news": "expunge.workloads.open_data:news",
        "code-secrets": "expunge.workloads.open_data:code_secrets",
        "facts": "expunge.workloads.open_data:facts",
        "movielens-rating": "expunge.workloads.movielens:movielens_rating",
        "movielens-people": "expunge.workloads.people:movielens_people",
    },
    group="expunge.workloads",
)
