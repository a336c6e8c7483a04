"""The prompts that the demo model learns, by the style of their answers, and what answers are told to begin with."""

from __future__ import annotations

from capkit.cogvlm2 import DEFAULT_PROMPT
from capkit.sweep import PROMPT_PRESETS

PROMPTS = {
    "detailed": (
        DEFAULT_PROMPT,
        "Describe this video in detail.",
        "Describe the video.",
        "Please describe what you see.",
        "Please describe the video.",
        "What happens in this video?",
        "What can be seen in this video?",
        "Write a detailed caption for this video.",
        "Give a detailed description of the video.",
        "Tell me what this video shows.",
        "Describe everything that you see in this video.",
        "Caption this video.",
        PROMPT_PRESETS["paragraph"][0],
        PROMPT_PRESETS["visible"][0],
        "Describe this video in one paragraph.",
        "Describe the video in a paragraph of at most 50 words.",
        "Write a paragraph about this video, with at most 80 words.",
        "Write only what you can see in this video.",
        "Describe only what is visible. Do not guess.",
        "Describe what is shown, without moods and opinions.",
    ),
    "sentence": (
        "Describe this video in one sentence.",
        "Please describe the video in one sentence.",
        "What does the video show? Answer in one sentence.",
        "Write a caption of one sentence for this video.",
        "In one sentence, what can be seen?",
        "Sum up the video in a single sentence.",
        "Give a one-sentence description.",
        "Describe the video in a single short sentence.",
    ),
    "list": (
        "List the objects in this video.",
        "Which objects can be seen? Answer as a list.",
        "List all objects that you see.",
        "Make a list of the objects.",
        "Please list the objects, one on each line.",
        "What objects are in the video? Give a list.",
    ),
    "motion": (
        PROMPT_PRESETS["motion"][0],
        "Describe the motion in this video.",
        "How do the objects and the camera move?",
        "Describe how everything moves, in the order of time.",
        "What moves in this video, and how?",
        "Describe what moves and what the camera does.",
    ),
    "json": (
        "Describe this video as JSON.",
        "Describe the video in JSON.",
        "Answer in JSON: what can be seen?",
        "Give a description as a JSON object.",
        "Please answer with JSON: background and objects.",
        "Return the background and the objects as JSON.",
    ),
}
FOLLOW_UPS = {
    "detailed": (
        "Describe the video again, in more detail.",
        "Describe the video, using your answers above.",
        "Now describe this video in detail.",
        "Refine your description.",
        "Write a better description.",
    ),
    "sentence": (
        "Summarise your answers in one sentence.",
        "Now say it in one sentence.",
        "Sum up the above in one sentence.",
        "Make it shorter: one sentence.",
    ),
}
"""Last questions of a chain (`Prompt.steps`), by the style of their answers."""
# What a caption may be told to begin with: what comes before a clause, before what is seen, and before any text.
CLAUSE_PREFIXES = ("In this video,", "In the video,", "In this clip,", "Here,", "We see that", "One can see that")
SEEN_PREFIXES = (
    *("The video shows", "This video shows", "The clip shows", "This clip shows", "The video features"),
    *("A video of", "A clip of", "This is a video of", "We see", "You can see", "I see", "The scene shows"),
)
TEXT_PREFIXES = ("Caption:", "Description:", "Video caption:", "Sure.", "Summary:")
