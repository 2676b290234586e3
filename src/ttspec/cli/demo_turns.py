"""The user turns of `ttspec demo`: a conversation that follows a topic, then changes it.

The texts occur in no training or evaluation file (`scripts/make_prompts.py` checks it). Each asks
for an answer of a few paragraphs.
"""

TURNS = (
    "I live by a small river now. Explain how a river shapes the land around it.",
    "List eight changes I could watch for on the riverbank in a year, with a sentence on each.",
    "Use some of those changes in a short story about a heron and an impatient miller.",
    "Now some Python: write a function that finds the longest rise in a list of water levels.",
    "A boat goes 12 miles downstream in 2 hours and back in 3. How fast is the current?",
    "Write a letter to the mayor asking for a wooden bench and a litter bin beside the water.",
    "Back to the kitchen: how do I make a vegetable stew for six guests without any hurry?",
    "One guest hates carrots and another is always late. Turn the evening into a comic dialogue.",
    "Describe how a watermill works, from the wheel to the flour.",
    "Finally, write a calm text of three paragraphs about the river and the guests going home.",
)
