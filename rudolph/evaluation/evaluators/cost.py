"""The cost of a model: floating-point operations per example, counted by torch.

Operations do not depend on the machine, so they compare costs between models.  Padding counts, so
they depend slightly on the batch.
"""

from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score

# Examples that are counted; lengths differ, so the counts are means.
NUM_COUNTED = 32
TRAINING_COST, ANSWER_COST = "cost/training_mflops", "cost/answer_mflops"


def cost(context: EvaluationContext, split: Split) -> list[Score]:
    """Count the operations per example: of one training step, and of giving the right answer.

    Images come with questions if the dataset has them, else with captions.  Trained weights need
    more operations than frozen ones, since their gradients are computed too.
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
