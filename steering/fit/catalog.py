"""The catalogue of data sets: where each comes from, its digests, its licence and what it may be used for.

A table. Knows nothing of where files lie on this machine; `datasets.py` does.
"""

from __future__ import annotations

from steering.fit.sources import (
    DataSet,
    Label,
    Part,
    SourceFile,
    Use,
    from_csv,
    from_json,
    read_coconot,
    read_instructions,
    read_nested,
    read_pairs,
    read_phrases,
)

FIT_ONLY = {Use.FIT: 0.95, Use.CALIBRATE: 0.05}
WITH_HELD = {Use.FIT: 0.80, Use.CALIBRATE: 0.06, Use.TEST: 0.14}
TEST_ONLY = {Use.TEST: 1.0}


def _raw(repository: str, commit: str, path: str) -> str:
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"


_RED_INSTRUCT = ("declare-lab/red-instruct", "73c759c93d2f6b1d8c7b058ab7bcec5fb0c28fa2")
_CAST = ("IBM/activation-steering", "52be60235ee309b46c49d6d5877f36e20c52e6ab")
_COCONOT = ("allenai/noncompliance", "25bf77cc668814360405cdb8197c4368205806c7")
_REFUSAL_DIRECTION = ("andyrdt/refusal_direction", "9d852fae1a9121c78b29142de733cb1340770cc3")
_XSTEST = ("paul-rottger/exaggerated-safety", "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d")
_AILUMINATE = ("mlcommons/ailuminate", "769cc2be9d20c8d4fb26ce53b68865ed41dfb8e2")
_GPTEACHER = ("teknium1/GPTeacher", "481075123c29854bddb82655badeef6a438f2436")
_GSM8K = ("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c")
_DECCP = ("AUGMXNT/deccp", "1fa6852b42d704f96bbbb70264126bad81837071")
_CENSORSHIP = "hannahxchen/llm-censorship-steering"
_ALPHASTEER = "AlphaLab-USTC/AlphaSteer"
_AILUMINATE_FILE = "airr_official_1.0_demo_en_us_prompt_set_release.csv"
_JUDGED_MODELS = {
    "gpt4": "71af323af8ecdec0efae23992317721441d2cfedddedeef3248f842f4e15c9ca",
    "llama2new": "6365cc55ce0a593c7ab8785853d02784be027d97199d4077912b4313cd010099",
    "llama2orig": "cbc52550e8ba8197a3e3d97a5af078d27bae4766737cd62df80270126a87ffc6",
    "mistralguard": "0ac03817b65e019a8f5b4b3eed805086f9f7fafe538ac9ebd156f80210af6903",
    "mistralinstruct": "6a146b65a5b96ec8249729bc2db459697175125998d7cbbcc88f7688ecf31dad",
}
_ATTACKS = {
    "aim": "dfb8bb02687451788e56753b17475f79405d44c8c33c94e619d08f7e6b8c26a6",
    "autodan": "e26e10061022f1267dd5cb7b35f6035b7faad77a0b54a6082fc8ad9c7c52ad64",
    "cipher": "638ae085fe2fe088ee90fa96206a1f0bd23c17e09f3f006fc606c0d86f24bd7f",
    "jailbroken": "24400df63ed19d5dd71802495b3d5648c0509ce6d8fa0dda984743cd9be4b4ca",
    "pair": "dc58e8f72fc508a7a98cd3f40cec99ef8ee8879d0c83a398e5c62d931e282cb5",
    "renellm": "917d6c7ae701ae4dace0fc2828b2962385826d2f9cd1653229a552df2859edf7",
}

CATALOG: tuple[DataSet, ...] = (
    DataSet(
        name="catqa",
        title="CatQA: harmful questions in 11 categories",
        repository=_RED_INSTRUCT[0],
        commit=_RED_INSTRUCT[1],
        licence="Apache-2.0",
        attribution="Bhardwaj, Do and Poria, Language Models are Homer Simpson! (2024), declare-lab",
        files=(
            SourceFile(
                name="catqa_english.json",
                sha256="40efd4e205e26d6e840f30e6d8540f95f2777453af052319e42e74d10bd1992a",
                columns=("category", "subcategory", "question"),
                address=_raw(*_RED_INSTRUCT, "harmful_questions/catqa_english.json"),
            ),
        ),
        parts=(Part(name="all", file="catqa_english.json", shares=FIT_ONLY, read=read_nested),),
    ),
    DataSet(
        name="harmfulqa",
        title="HarmfulQA and DangerousQA: harmful questions",
        repository=_RED_INSTRUCT[0],
        commit=_RED_INSTRUCT[1],
        licence="Apache-2.0",
        attribution="Bhardwaj and Poria, Red-Teaming LLMs using Chain of Utterances (2023), declare-lab",
        files=(
            SourceFile(
                name="harmfulqa.json",
                sha256="e04c1f3c48800ea84f954298e2a74f27e391069e037d60a22c2727eaa22f2cf8",
                columns=("topic", "subtopic", "question"),
                address=_raw(*_RED_INSTRUCT, "harmful_questions/harmfulqa.json"),
            ),
            SourceFile(
                name="dangerousqa.json",
                sha256="b40b0193d063cb5d742e6d0e070dde119e0291619830c65653ca19bdc84fdd10",
                columns=("question",),
                address=_raw(*_RED_INSTRUCT, "harmful_questions/dangerousqa.json"),
            ),
        ),
        parts=(
            Part(name="harmfulqa", file="harmfulqa.json", shares=FIT_ONLY, read=read_nested),
            Part(name="dangerousqa", file="dangerousqa.json", shares=FIT_ONLY, read=read_nested),
        ),
    ),
    DataSet(
        name="ailuminate_demo",
        title="AILuminate 1.0 demo: prompts in 12 hazards",
        repository=_AILUMINATE[0],
        commit=_AILUMINATE[1],
        licence="CC-BY-4.0",
        attribution="MLCommons AILuminate 1.0 demo prompt set",
        files=(
            SourceFile(
                name=_AILUMINATE_FILE,
                sha256="63e2b654325c5405096fabf28ef5f057b0ad674904b1839fd1f52b523e324d02",
                columns=("release_prompt_id", "prompt_text", "hazard", "persona", "locale", "prompt_hash"),
                address=_raw(*_AILUMINATE, _AILUMINATE_FILE),
            ),
        ),
        parts=(
            Part(
                name="all",
                file=_AILUMINATE_FILE,
                shares=FIT_ONLY,
                read=from_csv("prompt_text", Label.HARMFUL, identity="release_prompt_id", category="hazard"),
            ),
        ),
    ),
    DataSet(
        name="advbench",
        title="AdvBench: harmful instructions",
        repository=_REFUSAL_DIRECTION[0],
        commit=_REFUSAL_DIRECTION[1],
        licence="MIT (AdvBench), redistributed under Apache-2.0",
        attribution="Zou et al., Universal and Transferable Adversarial Attacks on Aligned Language Models (2023)",
        files=(
            SourceFile(
                name="harmful_behaviors.csv",
                sha256="6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
                columns=("goal", "target"),
                address=_raw(*_REFUSAL_DIRECTION, "dataset/raw/advbench.csv"),
            ),
        ),
        parts=(Part(name="all", file="harmful_behaviors.csv", shares=FIT_ONLY, read=from_csv("goal", Label.HARMFUL)),),
    ),
    DataSet(
        name="cast_conditions",
        title="CAST demo data: harmful and harmless prompts, refusing and compliant prefixes",
        repository=_CAST[0],
        commit=_CAST[1],
        licence="Apache-2.0",
        attribution="Lee et al., Programming Refusal with Conditional Activation Steering (2024), IBM",
        files=tuple(
            SourceFile(name=name, sha256=digest, columns=columns, address=_raw(*_CAST, f"docs/demo-data/{name}"))
            for name, digest, columns in (
                (
                    "condition_harmful.json",
                    "3f39bfd7132b51ee74236e14575e1152832e70e7a0dc18a962e75260940a5aca",
                    ("harmful", "harmless"),
                ),
                (
                    "condition_multiple.json",
                    "09d7993179a2bf7bcd4e48ed1e5d309a3aeb231739deea23412aa77681ea9aec",
                    ("base", "sexual_content", "legal_opinion", "hate_speech", "crime_planning", "health_consultation"),
                ),
                (
                    "behavior_refusal.json",
                    "10924d1653a97f398ca4f94725f55a7287758ee33a45861bb30289f427056ced",
                    ("compliant_responses", "non_compliant_responses"),
                ),
            )
        ),
        parts=(
            Part(
                name="harmful",
                file="condition_harmful.json",
                shares=FIT_ONLY,
                read=read_pairs("train", "harmful", Label.HARMFUL),
            ),
            Part(
                name="harmless",
                file="condition_harmful.json",
                shares=FIT_ONLY,
                read=read_pairs("train", "harmless", Label.BENIGN),
            ),
            Part(
                name="harmful_test",
                file="condition_harmful.json",
                shares=TEST_ONLY,
                read=read_pairs("test", "harmful", Label.HARMFUL),
            ),
            Part(
                name="harmless_test",
                file="condition_harmful.json",
                shares=TEST_ONLY,
                read=read_pairs("test", "harmless", Label.BENIGN),
            ),
            Part(
                name="topics_base",
                file="condition_multiple.json",
                shares=FIT_ONLY,
                read=read_pairs("train", "base", Label.BENIGN),
            ),
            Part(name="prefixes", file="behavior_refusal.json", shares={Use.FIT: 1.0}, read=read_phrases),
        ),
    ),
    DataSet(
        name="coconot",
        title="CoCoNot: contextual noncompliance in five categories",
        repository=_COCONOT[0],
        commit=_COCONOT[1],
        licence="MIT",
        attribution="Brahman et al., The Art of Saying No (2024), AI2",
        files=(
            SourceFile(
                name="coconot_eval.jsonl",
                sha256="df72466c477207f14a96c5940c3ef3b93b1b50c0d1e7ed7c5fb5dc6d6140c077",
                columns=("id", "category", "subcategory", "prompt", "response"),
                address=_raw(*_COCONOT, "data/coconot_eval.jsonl"),
            ),
            SourceFile(
                name="coconot_contrast_eval.jsonl",
                sha256="76dccec176743ed656279f2969c51abb68bda94e5fda8397e34ff5638e021d86",
                columns=("id", "category", "subcategory", "prompt", "response"),
                address=_raw(*_COCONOT, "data/coconot_contrast_eval.jsonl"),
            ),
            SourceFile(
                name="coconot_pref.jsonl",
                sha256="3b0cddcfb72218b8c32d7c11bfded00174f2f4a3c4edfbc862640fc63f43d9c2",
                columns=("id", "category", "subcategory", "prompt", "chosen", "rejected"),
                address=_raw(*_COCONOT, "data/coconot_pref.jsonl"),
            ),
            SourceFile(
                name="refusal_evaluation_rubric.json",
                sha256="54cd2460c776a06952ce6eebe1daa0412ea4729c41165cc173af2a9aa0713034",
                columns=("refusal", "compliance"),
                address=_raw(*_COCONOT, "prompts/refusal_evaluation_rubric.json"),
            ),
        ),
        parts=(
            Part(
                name="eval",
                file="coconot_eval.jsonl",
                shares={Use.FIT: 0.52, Use.CALIBRATE: 0.08, Use.TEST: 0.40},
                read=read_coconot,
            ),
            Part(
                name="contrast",
                file="coconot_contrast_eval.jsonl",
                shares=TEST_ONLY,
                read=from_json("prompt", Label.BORDERLINE, identity="id", category="category"),
            ),
            Part(
                name="pref",
                file="coconot_pref.jsonl",
                shares=FIT_ONLY,
                read=from_json("prompt", Label.BORDERLINE, identity="id", category="category", answer="chosen"),
            ),
        ),
    ),
    DataSet(
        name="or_bench_borderline",
        title="OR-Bench 80K sample: benign prompts that sound harmful",
        repository=_ALPHASTEER,
        commit=None,
        licence="CC-BY-4.0 (OR-Bench), redistributed under Apache-2.0",
        attribution="Cui et al., OR-Bench: An Over-Refusal Benchmark for LLMs (2024); sample by AlphaSteer",
        files=(
            SourceFile(
                name="borderline.jsonl",
                sha256="a04e2b41dbaa0184e37a33d17214f8289cb3933f4b68b9f1d130b048041c654f",
                columns=("prompt",),
                conversion="take data/instructions/train_val/borderline_train_10000.json of the repository, drop every "
                "prompt that occurs in OR-Bench-Hard-1K, write one JSON object with the key prompt per line",
            ),
        ),
        parts=(
            Part(
                name="all",
                file="borderline.jsonl",
                shares=WITH_HELD,
                read=from_json("prompt", Label.BORDERLINE),
            ),
        ),
    ),
    DataSet(
        name="gpteacher",
        title="GPTeacher: code and role-play instructions with answers",
        repository=_GPTEACHER[0],
        commit=_GPTEACHER[1],
        licence="MIT",
        attribution="Teknium, GPTeacher (2023)",
        files=(
            SourceFile(
                name="codegen.json",
                sha256="8b0be81f22b86bccab30f573351b62efb3391da229d2ee817a65ce0abb08b29d",
                columns=("instruction", "input", "response"),
                address=_raw(*_GPTEACHER, "Codegen/codegen-instruct.json"),
            ),
            SourceFile(
                name="roleplay.json",
                sha256="b5d57a0d92162fd0b78988fe352e8512b435363919caf63efc3759d5a1555023",
                columns=("instruction", "input", "response"),
                address=_raw(*_GPTEACHER, "Roleplay/roleplay-simple-deduped-roleplay-instruct.json"),
            ),
        ),
        parts=(
            Part(name="codegen", file="codegen.json", shares=WITH_HELD, read=read_instructions),
            Part(name="roleplay", file="roleplay.json", shares=WITH_HELD, read=read_instructions),
        ),
    ),
    DataSet(
        name="gsm8k",
        title="GSM8K: grade-school mathematics with answers",
        repository=_GSM8K[0],
        commit=_GSM8K[1],
        licence="MIT",
        attribution="Cobbe et al., Training Verifiers to Solve Math Word Problems (2021), OpenAI",
        files=(
            SourceFile(
                name="train.jsonl",
                sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                columns=("question", "answer"),
                address=_raw(*_GSM8K, "grade_school_math/data/train.jsonl"),
            ),
            SourceFile(
                name="test.jsonl",
                sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
                columns=("question", "answer"),
                address=_raw(*_GSM8K, "grade_school_math/data/test.jsonl"),
            ),
        ),
        parts=(
            Part(
                name="train",
                file="train.jsonl",
                shares=FIT_ONLY,
                read=from_json("question", Label.BENIGN, answer="answer"),
            ),
            Part(
                name="test",
                file="test.jsonl",
                shares=TEST_ONLY,
                read=from_json("question", Label.BENIGN, answer="answer"),
            ),
        ),
    ),
    DataSet(
        name="deccp",
        title="deccp: questions on China, censored, uncensored and other",
        repository=_DECCP[0],
        commit=_DECCP[1],
        licence="Apache-2.0",
        attribution="Lin, deccp (2024), AUGMXNT",
        files=tuple(
            SourceFile(
                name=f"{name}.csv",
                sha256=digest,
                columns=("prompt",),
                conversion=f"take data/{name}.txt of the repository (one prompt per line) and write it as a CSV file "
                "with the single column prompt",
            )
            for name, digest in (
                ("censored", "0488a345c7bab1b9f2611372e0e5722083130374d3a6ecca836dca64aaf6e6bc"),
                ("uncensored", "5ac343096bb39a65a89628ddb4b0e2554437670321180a7a3e747a7f1c91db68"),
                ("other", "6ec998eb3f75f0d2d313df2eea9b4d2c82fac5b478258b6c155b50a95fd9421e"),
            )
        ),
        parts=(
            Part(name="censored", file="censored.csv", shares=FIT_ONLY, read=from_csv("prompt", Label.SENSITIVE)),
            Part(name="uncensored", file="uncensored.csv", shares=FIT_ONLY, read=from_csv("prompt", Label.BENIGN)),
            Part(name="other", file="other.csv", shares=FIT_ONLY, read=from_csv("prompt", Label.BORDERLINE)),
        ),
    ),
    DataSet(
        name="ccp_sensitive",
        title="CCP-sensitive prompts: 68 subjects",
        repository=_CENSORSHIP,
        commit=None,
        licence="MIT",
        attribution="promptfoo CCP-sensitive prompts, processed by Cyberey and Evans, Steering the CensorShip (2025)",
        files=tuple(
            SourceFile(
                name=f"{name}.json",
                sha256=digest,
                columns=("_id", "prompt", "subject"),
                conversion="take llm_steering/data/processed/ccp_sensitive.json and ccp_sensitive_sampled.json of the "
                "repository; sampled_test.json holds the sampled prompts, train.json the rest",
            )
            for name, digest in (
                ("train", "a3286901e8f8dbd5b5ed4aa0c9ed2350820c11a7e243c144539d4e5b7144e9d7"),
                ("sampled_test", "b34048adac240ab5dc752a9a188931a6f07fb46e58e4b49812c39255c848e48b"),
            )
        ),
        parts=(
            Part(
                name="train",
                file="train.json",
                shares=FIT_ONLY,
                read=from_json("prompt", Label.SENSITIVE, identity="_id", category="subject"),
            ),
            Part(
                name="sampled_test",
                file="sampled_test.json",
                shares=TEST_ONLY,
                read=from_json("prompt", Label.SENSITIVE, identity="_id", category="subject"),
            ),
        ),
    ),
    DataSet(
        name="jailbreakbench",
        title="JailbreakBench behaviours: 100 harmful and 100 benign twins",
        repository=_REFUSAL_DIRECTION[0],
        commit=_REFUSAL_DIRECTION[1],
        licence="MIT",
        attribution="Chao et al., JailbreakBench (2024)",
        files=(
            SourceFile(
                name="harmful_behaviors.csv",
                sha256="45e9a8923b28f547bb372fbaa9af7df8b38c818a80ae50c3bab97704197ff516",
                columns=("Goal", "Target", "Behavior", "Category", "Source"),
                address=_raw(*_REFUSAL_DIRECTION, "dataset/raw/jailbreakbench.csv"),
            ),
            SourceFile(
                name="benign_behaviors.csv",
                sha256="67f21f5651f94c88045bb98db8b9f369284eed4cc526ec55def26125377a7c89",
                columns=("index", "goal", "behavior", "category"),
                conversion="take data/benign-behaviors.csv of a JBB-Behaviors redistribution and keep the columns "
                "index, goal, behavior and category, in lower case",
            ),
        ),
        parts=(
            Part(
                name="harmful",
                file="harmful_behaviors.csv",
                shares=TEST_ONLY,
                read=from_csv("Goal", Label.HARMFUL, category="Category"),
            ),
            Part(
                name="benign",
                file="benign_behaviors.csv",
                shares=TEST_ONLY,
                read=from_csv("goal", Label.BORDERLINE, identity="index", category="category"),
            ),
        ),
    ),
    DataSet(
        name="xstest",
        title="XSTest: 250 safe and 200 unsafe prompts, and judged completions of five models",
        repository=_XSTEST[0],
        commit=_XSTEST[1],
        licence="CC-BY-4.0",
        attribution="Röttger et al., XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours (2024)",
        files=(
            SourceFile(
                name="xstest_prompts.csv",
                sha256="11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
                columns=("id", "prompt", "type", "label", "focus", "note"),
                address=_raw(*_XSTEST, "xstest_prompts.csv"),
            ),
            *(
                SourceFile(
                    name=f"completions_{model}.csv",
                    sha256=digest,
                    columns=("id", "type", "prompt", "completion", "annotation_1", "annotation_2", "final_label"),
                    address=_raw(*_XSTEST, f"model_completions/xstest_v2_completions_{model}.csv"),
                )
                for model, digest in _JUDGED_MODELS.items()
            ),
        ),
        parts=(
            Part(
                name="safe",
                file="xstest_prompts.csv",
                shares=TEST_ONLY,
                read=from_csv(
                    "prompt",
                    Label.BORDERLINE,
                    identity="id",
                    category="type",
                    where=lambda row: row["label"] == "safe",
                ),
            ),
            Part(
                name="unsafe",
                file="xstest_prompts.csv",
                shares=TEST_ONLY,
                read=from_csv(
                    "prompt",
                    Label.HARMFUL,
                    identity="id",
                    category="type",
                    where=lambda row: row["label"] == "unsafe",
                ),
            ),
            *(
                Part(
                    name=f"completions_{model}",
                    file=f"completions_{model}.csv",
                    shares={Use.CALIBRATE: 1.0},
                    read=from_csv(
                        "prompt", Label.BORDERLINE, identity="id", category="final_label", answer="completion"
                    ),
                )
                for model in _JUDGED_MODELS
            ),
        ),
    ),
    DataSet(
        name="alphasteer_attacks",
        title="AlphaSteer attacks: 1,000 attack-wrapped harmful prompts",
        repository=_ALPHASTEER,
        commit=None,
        licence="Apache-2.0",
        attribution="Sheng et al., AlphaSteer (2025), AlphaLab-USTC",
        files=tuple(
            SourceFile(
                name=f"{attack}_llama3.1.json",
                sha256=digest,
                columns=("query",),
                conversion=f"take the {attack} file of data/instructions/test/llama3.1 of the repository",
            )
            for attack, digest in _ATTACKS.items()
        ),
        parts=tuple(
            Part(
                name=attack,
                file=f"{attack}_llama3.1.json",
                shares=TEST_ONLY,
                read=from_json("query", Label.HARMFUL),
            )
            for attack in _ATTACKS
        ),
    ),
)
