"""What measuring a reasoner needs: answers compared as mathematics, figures with intervals, programs that it wrote."""

from moejet.reasoning.answers import AnswerKey
from moejet.reasoning.metrics import mean_pass_at_k, wilson_interval
from moejet.reasoning.sandbox import run_python, sandbox_level

answers = AnswerKey()
print(answers.is_correct(r"<think>...</think> so \boxed{\frac{1}{2}}", "0.5"))
print(answers.group(["1/2", "2", "0.5"]))  # which ones agree

right = [[True, False, False, False], [True, True, True, False]]  # two problems, four samples each
print(f"pass@2 {mean_pass_at_k(right, k=2):.2f}, 81 of 100 is {wilson_interval(81, 100)}")

result = run_python(
    "print(sum(range(10)))"
)  # in a process that can compute and print, and nothing else
print(result.status, result.stdout.strip(), sandbox_level())
