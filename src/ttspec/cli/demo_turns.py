"""The user turns of `ttspec demo`: a conversation that follows a topic, then changes it.

The texts occur in no training or evaluation file (`scripts/make_prompts.py` checks it). Each asks
for an answer of a few paragraphs, so that at no more than 256 generated tokens a turn `SHORT` makes
about 1,500 tokens and `LONG` about 6,000.
"""

SHORT = (
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

LONG = (
    *SHORT,
    "How did people make maps before there were satellites, and which errors were typical?",
    "List ten things a mapmaker of the year 1600 might carry, with the use of each.",
    "Write a page from the diary of that mapmaker on the day the ink runs out.",
    "Write a Python function that turns steps such as 'N3' and 'E5' into a final position.",
    "What would have to change in it if diagonal steps such as 'NE2' were allowed?",
    "Two farms are 9 cm apart on a map of scale 1 to 25,000. How far is the walk? Explain.",
    "Explain to a curious teenager why the sky is blue at noon and red in the evening.",
    "Write a conversation between the colours blue and red about who the sky belongs to.",
    "Write an email that offers this conversation to a theatre group and describes the stage.",
    "The group accepts. Make a plan for six weeks of rehearsals with one aim for each week.",
    "Change of subject: what happens in the body when we run for a bus?",
    "Which habits keep a heart healthy? Give me seven and explain the reason for each.",
    "A runner covers 5 km in 28 minutes and wants to save 90 seconds. What pace does she need?",
    "Write a short story about two runners who share one pair of shoes.",
    "Write a Python class for a training log that adds runs and reports the weekly distance.",
    "Explain that class to somebody who has never written a program.",
    "Describe a market in a harbour town at six in the morning, with its sounds and smells.",
    "What does a fishmonger need to know about ice, knives and honest weights?",
    "A crate of 40 mackerel costs 52 pounds; 6 spoil. What price each leaves a profit of 33?",
    "Write a ballad of five verses about a gull who steals the last herring.",
    "Explain what makes a verse sound like a song, and show it with lines from your ballad.",
    "How did sailors keep time at sea, and why did it matter for finding their position?",
    "Write a letter from a ship's cook to his sister after three months without land.",
    "Now write her reply, with news from home and one piece of bad news told gently.",
    "Suggest a board game built on that voyage: its aim, its pieces, and how somebody wins.",
    "Write a Python function that simulates one turn of the game with two dice.",
    "Look back on all this and write a closing text that joins river, map and voyage.",
)
