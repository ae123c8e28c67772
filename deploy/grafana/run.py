"""The dashboard *run*: how far is it, is it learning, what is it waiting for, is it safe."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    COUNT,
    GREEN,
    MILLISECONDS,
    NATS,
    RED,
    SECONDS,
    SHARE,
    STEPS,
    TOKENS,
    TOKENS_PER_S,
    Query,
    Section,
    facts,
    make,
    number,
    series,
    states,
    variables,
)

_CHOSEN = 'namespace=~"$namespace",run=~"$run"'


def _of(name: str) -> str:
    """The figure of the chosen runs that has this name."""
    return f"stillhouse_student_{name}{{{_CHOSEN}}}"


def _figures(**names: str) -> list[Query]:
    """Figures and what they are called, each of every run."""
    return [(f"max by (run) ({_of(name)})", f"{{{{run}}}} {called}") for name, called in names.items()]


def _since(name: str) -> str:
    return f"time() - max by (run) ({_of(name)})"


def _progress() -> Section:
    left = f"max by (run) ({_of('steps')} - {_of('step')})"
    alerts = 'ALERTS{alertstate="firing",alertname=~"Run.+",namespace=~"$namespace|"}'
    return "How far is it?", [
        number(
            "Done",
            "Steps done of those planned.",
            (f"max by (run) ({_of('step')} / {_of('steps')})", "{{run}}"),
            unit=SHARE,
        ),
        number(
            "Time left",
            "Steps that are left, at the mean time of the steps of the last half hour. Evaluations and saves come on "
            "top.",
            (f"{left} * max by (run) (avg_over_time({_of('step_s')}[30m]))", "{{run}}"),
            unit=SECONDS,
        ),
        number(
            "Since the last step",
            "Good: about the time of a step. Much more: the section *What is it waiting for?* says whether it waits "
            "for teachers.",
            (_since("last_step_timestamp_seconds"), "{{run}}"),
            unit=SECONDS,
            alert="RunStalled",
        ),
        number(
            "Alerts that fire",
            "Of this project, about runs. Each has a runbook page.",
            (f"count({alerts}) or vector(0)", "alerts"),
            unit=COUNT,
            bad_above=1,
        ),
        facts(
            "What runs?",
            "Recipe, teacher and version of each run. A run pins the teacher's revision.",
            f"max by (run, recipe, teacher_model, teacher_revision, version) ({_of('info')})",
            columns=("run", "recipe", "teacher_model", "teacher_revision", "version"),
            width=8,
        ),
    ]


def _learning() -> Section:
    terms = f'{{__name__=~"stillhouse_student_(loss|term_.+)",{_CHOSEN}}}'
    return "Is it learning?", [
        series(
            "Are answers better?",
            "Mean reward, and the share of answers that pass the verifier. Good: rises, then levels off. Flat from the "
            "start: problems that are too hard or too easy, or a learning rate that is too small.",
            *_figures(reward="reward", pass_rate="pass rate"),
            unit=COUNT,
            alert="RunRewardFlat",
        ),
        series(
            "Does it come closer to the teacher?",
            "On the student's own answers: `kl` is estimated from sampled tokens (it may dip below 0 by noise), the "
            "two divergences are over the teacher's top tokens and the tail. Good: fall towards 0. A forward KL that "
            "stays while the others fall: modes of the teacher are missing.",
            *_figures(kl="kl", reverse_kl="reverse KL", forward_kl="forward KL"),
            unit=NATS,
            alert="RunKlRising",
        ),
        series(
            "Does it keep its variety?",
            "Entropy of the student and of the teacher at the same places. Good: the student's comes near the "
            "teacher's. Far below it: the student collapses.",
            *_figures(entropy="student", teacher_entropy="teacher"),
            unit=NATS,
            alert="RunEntropyCollapse",
            low=0,
        ),
        series(
            "How long are answers?",
            "Mean tokens of an answer. Distillation lengthens answers to those of the teacher; growth without an end "
            "goes with truncation or repetition.",
            *_figures(response_length="length"),
            unit=TOKENS,
            alert="RunLengthBlowUp",
            low=0,
        ),
        series(
            "Are answers cut off, or do they loop?",
            "Share of answers cut at max_new_tokens, and of their 4-grams that they already had. Good: near 0. Cut "
            "answers get no reward: raise max_new_tokens.",
            *_figures(truncated_share="truncated", repetition="repetition"),
            unit=SHARE,
            alert="RunTruncated",
            low=0,
            high=1,
        ),
        series(
            "Are updates sound?",
            "Norm of the gradient before clipping, the largest of a step. Good: level, or slowly falling. A spike that "
            "the curves above answer to: lower the learning rate.",
            *_figures(grad_norm="gradient"),
            unit=COUNT,
            low=0,
        ),
        series(
            "What is the loss made of?",
            "The loss, and the mean of each of its terms. One that dwarfs the others decides alone: see the weights of "
            "the objective. The loss itself need not fall.",
            (f"max by (run, __name__) ({terms})", "{{run}} {{__name__}}"),
            unit=COUNT,
        ),
        series(
            "Do sampler and trainer agree?",
            "Distance of the log-probabilities of the sampled tokens: at the first update of a step (the sampler's own "
            "error: rounding, below 1e-3 in float32) and later (how far the student has moved since it sampled).",
            *_figures(sampler_gap="sampler", off_policy_gap="off policy"),
            unit=NATS,
            low=0,
        ),
        series(
            "Is the teacher asked where it matters?",
            "Probability that the teacher and the student give to the tokens that are compared, and the share of the "
            "student's candidates among the teacher's top ones. Good: near 1, and the share rises. If the student's "
            "falls, raise teacher.candidates; if the teacher's does, teacher.top_k.",
            *_figures(teacher_mass_on_support="teacher", student_mass_on_support="student", top_k_overlap="overlap"),
            unit=SHARE,
            high=1,
        ),
    ]


def _waiting() -> Section:
    parts = {"rollout_s": "rollout", "reward_s": "reward", "waiting_s": "waiting", "training_s": "training"}
    return "What is it waiting for?", [
        series(
            "Where does a step's time go?",
            "Answers, verifiers, waiting for scores or a rollout engine, training. With rollout.batches_ahead parts "
            "happen at the same time and the sum is above the step. Best read with one run chosen.",
            *_figures(**parts),
            unit=SECONDS,
            stacked=True,
            low=0,
        ),
        series(
            "What share of it is waiting?",
            "Good: near 0, the teachers keep up. If not: rollout.batches_ahead: 1, or more teachers.",
            *_figures(waiting_share="waiting"),
            unit=SHARE,
            alert="RunWaiting",
            bad_above=0.5,
            low=0,
            high=1,
        ),
        series(
            "What do teachers do meanwhile?",
            "The server's own words, mean over answers: time in its queue and with its engine. A queue that grows: "
            "more teachers, or fewer tenants. Little of both while the run waits: the network, or the client.",
            *_figures(teacher_queue_wait_ms="queue", teacher_engine_ms="engine"),
            unit=MILLISECONDS,
            low=0,
        ),
        series(
            "Are teachers away?",
            "The outage that lasts now, and calls that were sent again in the last step. Good: 0; some retries while "
            "servers are replaced. A run ends by itself after teacher.outage_s (two hours).",
            (f"max by (run) ({_of('teacher_outage_now_s')} or {_of('teacher_outage_s')})", "{{run}} outage"),
            *_figures(teacher_retries="retries"),
            unit=SECONDS,
            alert="RunTeacherOutage",
            bad_above=900,
            low=0,
            other_units={".* retries": COUNT},
            width=12,
        ),
        series(
            "How fast is it?",
            "Response tokens a second, all in all.",
            *_figures(tokens_per_s="tokens"),
            unit=TOKENS_PER_S,
            low=0,
            width=12,
        ),
    ]


def _safety() -> Section:
    return "Is it safe?", [
        series(
            "How much would a crash cost?",
            "Time since the newest whole checkpoint. Good: at most the time of checkpoints.every_steps steps. Without "
            "checkpoints it grows from the start.",
            (_since("last_checkpoint_timestamp_seconds"), "{{run}}"),
            unit=SECONDS,
            alert="RunCheckpointOld",
            bad_above=14400,
            low=0,
        ),
        series(
            "How old are the answers that it learns from?",
            "Steps that the student made between answering and learning from it. Good: at most rollout.batches_ahead.",
            *_figures(staleness="staleness"),
            unit=STEPS,
            alert="RunStale",
            low=0,
        ),
        series(
            "Is anything left out?",
            "Answers of a step that the teacher could not score, and whose verifier broke. Good: 0. A run ends above "
            "teacher.max_unscored_share.",
            *_figures(unscored="unscored", dropped="verifier broke"),
            unit=COUNT,
            alert="RunUnscored",
            low=0,
        ),
        states(
            "Which of its own alarms were raised?",
            "The bands of `guards`: entropy far from that of the first steps, answers much longer than then, many cut "
            "off. Alarms tell and do nothing else.",
            *_figures(alarm_entropy="entropy", alarm_length="length", alarm_truncated="truncated"),
            names={0: ("in its band", GREEN), 1: ("raised", RED)},
        ),
        facts(
            "Which runs failed, and why?",
            "Runs that ended with an error, for as long as metrics_hold_s keeps them here. Good: empty.",
            f"max by (namespace, run, reason) ({_of('failed')}) > 0",
            columns=("namespace", "run", "reason"),
            empty="no run failed",
        ),
    ]


def dashboard() -> Dashboard:
    """The dashboard."""
    return make(
        "Stillhouse: run",
        "stillhouse-run",
        "A training run. From the top: how far is it, is it learning, what is it waiting for, is it safe. How to read "
        "it: docs/dashboards.md; every figure: docs/metrics.md.",
        menus=variables(
            ("namespace", "Namespace", "label_values(stillhouse_student_step, namespace)"),
            ("run", "Run", 'label_values(stillhouse_student_step{namespace=~"$namespace"}, run)'),
        ),
        sections=[_progress(), _learning(), _waiting(), _safety()],
        other=("Pool", "stillhouse-pool"),
    )
