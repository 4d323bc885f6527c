"""Five rows of every layout: the same five facts, as each tool or data set writes them."""

import json

FACTS = [
    ("What colour is the sky?", "Blue, on a clear day.", "Green, as everyone knows."),
    ("Name a prime above ten.", "Eleven is prime.", "Twelve is one."),
    ("Who wrote Hamlet?", "Shakespeare wrote it.", "Marlowe did."),
    ("Is ice lighter than water?", "Yes, so it floats.", "No, it sinks."),
    ("How many legs has a spider?", "Eight.", "Six."),
]
MIDDLE = "I would have to look that up."


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def transcript(prompt, answer):
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}"


def by_turns(index, first, second):
    """Put the better one first in even rows and second in odd ones."""
    return (first, second) if index % 2 == 0 else (second, first)


def ratings(value):
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {name: {"Rating": str(value), "Rationale": "It says so."} for name in names}


def ultrafeedback(prompt, good, bad):
    def completion(text, model, value, overall):
        return {
            "response": text,
            "model": model,
            "principle": "helpfulness",
            "custom_system_prompt": "Answer briefly.",
            "annotations": ratings(value),
            "fine-grained_score": float(value),
            "overall_score": overall,
            "critique": "Fine.",
        }

    return {
        "source": "facts",
        "instruction": prompt,
        "models": ["a", "b", "c"],
        # The overall score of the worst one is the 10 of the early revisions.
        "completions": [
            completion(MIDDLE, "a", 3, 6.0),
            completion(bad, "b", 1, 10.0),
            completion(good, "c", 5, 8.5),
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def shp(index, prompt, good, bad):
    first, second = by_turns(index, good, bad)
    return {
        "post_id": f"p{index}",
        "domain": "askfacts_train",
        "upvote_ratio": 0.97,
        "history": prompt,
        "c_root_id_A": "ca",
        "c_root_id_B": "cb",
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": 8 if index % 2 == 0 else 4,
        "score_B": 4 if index % 2 == 0 else 8,
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": 1 - index % 2,
        "seconds_difference": 1.0,
        "score_ratio": 2.0,
    }


def helpsteer2(prompt, answer, helpfulness):
    return {
        "prompt": prompt,
        "response": answer,
        "helpfulness": helpfulness,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    }


def arena(index, prompt, good, bad, content=lambda text: text):
    first, second = by_turns(index, good, bad)
    return {
        "question_id": f"q{index}",
        "model_a": "x",
        "model_b": "y",
        "winner": "model_a" if index % 2 == 0 else "model_b",
        "judge": "arena_user_1",
        "conversation_a": [
            {"role": "user", "content": content(prompt)},
            {"role": "assistant", "content": content(first)},
        ],
        "conversation_b": [
            {"role": "user", "content": content(prompt)},
            {"role": "assistant", "content": content(second)},
        ],
        "turn": 1,
        "language": "English",
        "tstamp": 1.0,
    }


def kaggle(index, prompt, good, bad):
    first, second = by_turns(index, good, bad)
    return {
        "id": index,
        "model_a": "x",
        "model_b": "y",
        "prompt": json.dumps([prompt]),
        "response_a": json.dumps([first]),
        "response_b": json.dumps([second]),
        "winner_model_a": 1 - index % 2,
        "winner_model_b": index % 2,
        "winner_tie": 0,
    }


def nectar(prompt, good, bad):
    return {
        "prompt": f"\n\nHuman: {prompt}\n\nAssistant: ",
        "answers": [
            {"answer": MIDDLE, "model": "a", "rank": 2.0},
            {"answer": bad, "model": "b", "rank": 3.0},
            {"answer": good, "model": "c", "rank": 1.0},
        ],
        "turns": 1,
        "num_responses": 3,
        "source": ["facts"],
        "good_natured": True,
    }


def nemo(prompt, good, bad):
    return {
        "context": [user(prompt)],
        "completions": [
            {"rank": 2, "completion": [bot(bad)]},
            {"rank": 0, "completion": [bot(good)]},
            {"rank": 1, "completion": [bot(MIDDLE)]},
        ],
        "task_name": "facts",
    }


def summarize(index, prompt, good, bad):
    first, second = by_turns(index, good, bad)
    return {
        "info": {"id": f"t3_{index}", "post": prompt, "title": "A fact", "subreddit": "facts"},
        "summaries": [
            {"text": f" {first}", "policy": "sup2", "note": "ok"},
            {"text": f" {second}", "policy": "ref", "note": "ok"},
        ],
        "choice": index % 2,
        "worker": "w",
        "batch": "b",
        "split": "train",
        "extra": {"confidence": 7},
    }


def summary_prompt(prompt):
    return f"SUBREDDIT: r/facts\n\nTITLE: A fact\n\nPOST: {prompt}\n\nTL;DR:"


def pku(index, prompt, good, bad):
    first, second = by_turns(index, good, bad)
    return {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "better_response_id": index % 2,
        "safer_response_id": 1 - index % 2,
        "is_response_0_safe": True,
        "is_response_1_safe": True,
    }


def pairwise(index, prompt, good, bad, names):
    first, second = by_turns(index, good, bad)
    return dict(zip(names, (prompt, first, second), strict=True))


FIXTURES = {
    "trl_standard": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in FACTS],
    "trl_standard_implicit": [{"chosen": f"{p} {c}", "rejected": f"{p} {r}"} for p, c, r in FACTS],
    "trl_conversational": [
        {"prompt": [user(p)], "chosen": [bot(c)], "rejected": [bot(r)]} for p, c, r in FACTS
    ],
    "trl_conversational_implicit": [
        {"id": "x", "chosen": [user(p), bot(c)], "rejected": [user(p), bot(r)]} for p, c, r in FACTS
    ],
    "h4_ultrafeedback": [
        {
            "prompt": p,
            "prompt_id": "0f",
            "chosen": [user(p), bot(c)],
            "rejected": [user(p), bot(r)],
            "messages": [user(p), bot(c)],
            "score_chosen": 8.0,
            "score_rejected": 5.5,
        }
        for p, c, r in FACTS
    ],
    "openai": [
        {
            "input": {"messages": [user(p)], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [bot(c)],
            "non_preferred_output": [bot(r)],
        }
        for p, c, r in FACTS
    ],
    "anthropic_hh": [
        {"chosen": transcript(p, c), "rejected": transcript(p, r)} for p, c, r in FACTS
    ],
    "argilla_ultrafeedback": [
        {
            "source": "facts",
            "instruction": p,
            "chosen_response": c,
            "rejected_response": r,
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 2.0,
            "chosen_model": "x",
        }
        for p, c, r in FACTS
    ],
    "argilla_cleaned": [
        {
            "source": "facts",
            "prompt": p,
            "chosen": [user(p), bot(c)],
            "chosen-rating": 4.5,
            "chosen-model": "x",
            "rejected": [user(p), bot(r)],
            "rejected-rating": 2.0,
            "rejected-model": "y",
        }
        for p, c, r in FACTS
    ],
    "ultrafeedback_raw": [ultrafeedback(*fact) for fact in FACTS],
    "shp": [shp(index, *fact) for index, fact in enumerate(FACTS)],
    "helpsteer2": [helpsteer2(p, *answer) for p, c, r in FACTS for answer in ((r, 1), (c, 4))],
    "helpsteer2_preference": [
        pairwise(index, *fact, ("prompt", "response_1", "response_2"))
        | {"preference_strength": -2 if index % 2 == 0 else 2, "split": "train"}
        for index, fact in enumerate(FACTS)
    ],
    "helpsteer3": [
        pairwise(index, [user(p)], c, r, ("context", "response1", "response2"))
        | {
            "domain": "general",
            "language": "english",
            "overall_preference": -2 if index % 2 == 0 else 2,
            "individual_preference": [{"score": -2, "reasoning": "It is right."}],
        }
        for index, (p, c, r) in enumerate(FACTS)
    ],
    "arena": [arena(index, *fact) for index, fact in enumerate(FACTS)],
    "arena_kaggle": [kaggle(index, *fact) for index, fact in enumerate(FACTS)],
    "nectar": [nectar(*fact) for fact in FACTS],
    "nemo_rl": [nemo(*fact) for fact in FACTS],
    "kto": [
        {"prompt": p, "completion": answer, "label": label}
        for side, label in ((2, False), (1, True))
        for p, answer in ((fact[0], fact[side]) for fact in FACTS)
    ],
    "kto_llama_factory": [
        {"instruction": p, "input": "", "output": answer, "kto_tag": label}
        for p, c, r in FACTS
        for answer, label in ((c, True), (r, False))
    ],
    "kto_ms_swift": [
        {"messages": [user(p), bot(answer)], "label": label}
        for p, c, r in FACTS
        for answer, label in ((c, True), (r, False))
    ],
    "llama_factory_alpaca": [
        {"instruction": p, "input": "", "chosen": c, "rejected": r} for p, c, r in FACTS
    ],
    "llama_factory_sharegpt": [
        {
            "conversations": [{"from": "human", "value": p}],
            "chosen": {"from": "gpt", "value": c},
            "rejected": {"from": "gpt", "value": r},
        }
        for p, c, r in FACTS
    ],
    "ms_swift": [{"messages": [user(p), bot(c)], "rejected_response": r} for p, c, r in FACTS],
    "axolotl": [{"input": p, "chosen_response": c, "rejected_response": r} for p, c, r in FACTS],
    "axolotl_chat": [
        {"messages": [user(p)], "chosen": bot(c), "rejected": bot(r)} for p, c, r in FACTS
    ],
    "stack_exchange": [
        {"qid": 1, "question": p, "response_j": c, "response_k": r} for p, c, r in FACTS
    ],
    "summarize_from_feedback": [summarize(index, *fact) for index, fact in enumerate(FACTS)],
    "pku_saferlhf": [pku(index, *fact) for index, fact in enumerate(FACTS)],
    "webgpt": [
        pairwise(index, {"full_text": p, "id": "x"}, c, r, ("question", "answer_0", "answer_1"))
        | {"score_0": 0.5 - index % 2, "score_1": -0.5 + index % 2}
        for index, (p, c, r) in enumerate(FACTS)
    ],
    "orca": [{"system": "", "question": p, "chosen": c, "rejected": r} for p, c, r in FACTS],
    "misspelled": [{"prompt": p, "choosen": c, "rejected": r} for p, c, r in FACTS],
    "messages_chosen_rejected": [
        {"messages": [user(p)], "chosen": c, "rejected": r} for p, c, r in FACTS
    ],
}

MARGINS = {
    "h4_ultrafeedback": 2.5,
    "argilla_ultrafeedback": 2.5,
    "argilla_cleaned": 2.5,
    "ultrafeedback_raw": 4.0,
    "shp": 0.6931471805599453,
    "helpsteer2": 3.0,
    "helpsteer2_preference": 2.0,
    "helpsteer3": 2.0,
    "nectar": 2.0,
    "nemo_rl": 2.0,
    "summarize_from_feedback": 7.0,
    "webgpt": 1.0,
}
