"""The cost of a model: floating-point operations per example, counted by torch.

Times depend on the machine and the batch size; operations do not, so they compare models at an
equal budget.
"""

from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score

# Examples that are counted; lengths differ, so the counts are means.
NUM_COUNTED = 32
TRAINING_COST, ANSWER_COST = "cost/training_mflops", "cost/answer_mflops"


def cost(context: EvaluationContext, split: Split) -> list[Score]:
    """Count the operations per image: of a training step, and of answering.

    Images come with questions if the dataset has them, else with captions.  Trained weights need
    more operations than frozen ones, since their gradients are computed too.  Padding counts.
    """
    indices = context.eval_indices(split)[:NUM_COUNTED]
    questions = [split.questions[index] for index in indices]
    has_questions = all(questions)
    counts = context.model.count_operations(
        "question_answering" if has_questions else "image_captioning",
        [split.captions[index] for index in indices],
        images=split.image_batch(indices),
        questions=questions if has_questions else None,
    )
    return [
        Score(name, split.name, count / 1e6, count / 1e6, count / 1e6, None, len(indices))
        for name, count in zip((TRAINING_COST, ANSWER_COST), counts, strict=True)
    ]
