"""The cost of a model: floating-point operations per example, counted by torch.

The counts do not depend on the machine, so they are comparable between models.  Padding is counted
too, so the counts depend slightly on the batch.
"""

from rudolph.data.splits import Split
from rudolph.evaluation.context import EvaluationContext, Score

# Number of examples whose operations are counted and averaged, because their lengths differ.
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
