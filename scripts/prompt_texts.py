"""Hand-written texts from which `make_prompts.py` builds its prompts.

Names starting with TRAIN feed the training prompts only. HELD_OUT, SESSION and MIXED feed the
evaluation files only: their topics and wordings are meant to occur nowhere in the first group.
Wordings are chosen so that a singular and a plural topic both read well.
"""


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text."""
    return tuple(line.strip() for line in text.strip().splitlines())


def phrases(text: str) -> tuple[str, ...]:
    """The parts of a text between semicolons."""
    return tuple(phrase.strip() for phrase in " ".join(text.split()).split(";"))


# ----------------------------------------------------------------------------------------- training
TRAIN_THINGS = phrases("""
photosynthesis; the water cycle; gravity; inflation; the stock market; black holes; vaccines;
electric cars; solar panels; the French Revolution; the Industrial Revolution; ancient Egypt; the
Renaissance; the Great Wall of China; democracy; the human brain; sleep; DNA; evolution; climate
change; recycling; artificial intelligence; the internet; computer memory; encryption; batteries;
nuclear power; magnetism; the Moon; the planet Mars; ocean tides; rainbows; whales; ants; wolves;
bird migration; soil; bacteria; the immune system; the digestive system; healthy nutrition;
Shakespeare's plays; impressionist painting; opera; the Olympic Games; football; the English
language; poetry; Greek mythology; Buddhism; supply and demand; taxes; health insurance; credit
cards; city planning; public transport; railways; airplanes; chocolate; rice farming; cotton;
plastic; steel; concrete; the history of money; time zones; calendars; the metric system; prime
numbers; probability; fractions; triangles""")

TRAIN_ACTIVITIES = phrases("""
learning to play the guitar; growing tomatoes on a balcony; keeping bees; baking cookies; training a
puppy; saving money; preparing for a job interview; learning a new language; writing a novel; giving
a speech; planning a wedding; camping in the woods; hiking in the mountains; painting a room; moving
to a new city; starting a small business; studying for exams; making friends at a new school;
cooking for a large family; reading to children; learning to swim; doing yoga at home; meditating
every morning; knitting a scarf; repairing an old chair; fixing a leaking tap; learning to drive;
riding a horse; travelling alone; taking care of an elderly parent; organising a birthday party;
cleaning the house; working from home; building a website; learning to program; drawing portraits;
playing the piano; singing in a choir; running a book club; volunteering at an animal shelter;
keeping a diary; waking up early; eating less sugar; dealing with stress; speaking up in meetings;
teaching a child to read; buying a used car; renting a first apartment; packing for a long trip;
fishing on a lake; making pottery; composting kitchen waste; hosting dinner guests; caring for house
plants; choosing a career; writing a thank-you note; setting up a home office; joining a gym;
walking a dog in the rain; adopting a cat; making soup; learning to dance; staying in touch with old
friends; asking for a raise""")

TRAIN_FOR_ALL = phrases("""
Tell me about {t}.; Write a short paragraph about {t}.; List five interesting facts about {t}.; List
ten words that come to mind when you think of {t} and say why.; Explain {t} to a ten-year-old
child.; Write a short poem about {t}.; Write a four-line rhyme about {t}.; Write a dialogue between
a teacher and a student about {t}.; Write a dialogue between two friends who disagree about {t}.;
Write a letter to a newspaper about {t}.; Write an email to a colleague who asked you about {t}.;
Write a short story in which {t} plays an important role.; Write the opening paragraph of an essay
about {t}.; Write a short blog post about {t}.; Give me three common mistakes people make when they
talk about {t}.; What are the most common questions people ask about {t}? Answer each one briefly.;
Suggest five titles for an article about {t}.; Write a quiz with five questions and answers about
{t}.; Make a study plan of one week for somebody who wants to know more about {t}.; Write a speech
of two minutes about {t}.; Describe {t} as if you were telling a blind friend.; What do you find
most interesting about {t}?; Why do so many people care about {t}?; Write a conversation in a cafe
in which somebody brings up {t}.; Summarise the most important points about {t} in a few sentences.;
Write a short introduction to {t} for a school magazine.; Write a radio announcement about {t}.;
What are the good and the bad sides of {t}?; Write a diary entry of somebody who spent the whole day
thinking about {t}.; Give me an outline for a presentation on {t}.""")

TRAIN_FOR_THINGS = phrases("""
Explain {t} in simple words.; Explain {t} step by step.; What should every student know about {t}?;
How would you define {t}?; Write a short history of {t}.; How has our understanding of {t} changed
over time?; What is the importance of {t} in everyday life?; Give an example that helps to
understand {t}.; What are the most important parts of {t}?; Write a glossary of eight terms related
to {t}.; What would happen if {t} did not exist?; Who studies {t}, and why?; Name three books or
films in which {t} could appear and describe the scene.; Explain to my grandmother why {t} matters.;
What are some myths about {t}, and what is the truth?; Write a lesson plan of one hour
about {t}.""")

TRAIN_FOR_ACTIVITIES = phrases("""
Give me advice on {t}.; How do I get better at {t}?; I am thinking about {t}. Where should I start?;
Give me a step-by-step guide to {t}.; Make a checklist for {t}.; What do I need before {t}?; What
can go wrong with {t}, and how can I avoid it?; How much time should I plan for {t}?; I am nervous
about {t}. Can you encourage me?; My friend keeps talking about {t}. What could I ask her?; Write a
letter to a friend in which you tell them about {t}.; Write a funny story about somebody who fails
at {t}.; What are the benefits of {t}?; Can you suggest a daily routine that leaves time for {t}?;
Give me ten tips for {t}.; Write a social media post about {t}.""")

TRAIN_PAIRS = phrases("""
cats and dogs; tea and coffee; books and films; living in the city and living in the country; trains
and planes; summer and winter; online classes and classroom lessons; renting and buying a home;
lions and tigers; plants and animals; democracy and monarchy; Python and Java; arrays and linked
lists; atoms and molecules; viruses and bacteria; weather and climate; butter and olive oil; team
sports and individual sports; mountains and beaches; breakfast and dinner; laptops and desktop
computers; paper books and e-books; being an employee and being self-employed; ancient Rome and
ancient Greece; frogs and toads; the Sun and the Moon; metals and plastics; introverts and
extroverts; novels and short stories; fixed prices and auctions""")

TRAIN_COMPARE = lines("""
Compare {t}.
What are the main differences between {t}?
What do {t} have in common?
Write a dialogue about {t}, with one speaker on each side.
Make a table that compares {t}.
If you had to choose between {t}, what would you take into account?
Write a short essay comparing {t}.
Explain the difference between {t} to a beginner, with examples.""")

TRAIN_PEOPLE = phrases("""
an old fisherman; a young doctor; a shy violin player; a robot; a retired teacher; a tired baker; a
princess; a dragon; a boy from a small village; a girl who loves maps; a night watchman; a famous
painter; a clumsy wizard; a taxi driver; a talking fox; an astronaut; a librarian; a farmer; a
lonely king; a street musician; a detective; two sisters; a lost puppy; a gardener; a clever thief;
a nurse; a sailor; a ghost; a boy and his grandfather; a clockmaker""")

TRAIN_EVENTS = phrases("""
finding a letter without a sender; missing the last train; discovering a door in the cellar; losing
something precious; meeting an old friend; getting lost in the fog; winning a strange prize; hearing
a voice in the forest; learning to forgive; keeping a secret; waking up in another century; saving a
stranger; telling one lie too many; opening a shop; building a bridge; waiting for the rain;
crossing a desert; finding a baby bird; breaking a promise; growing up; seeing the ocean for the
first time; spending a night in a museum; repairing an old radio; saying goodbye; running away from
home""")

TRAIN_STORIES = lines("""
Write a short story about {p} {e}.
Tell me a bedtime story about {p} {e}.
Write the first page of a novel about {p} {e}.
Write a funny story about {p} {e}.
Write a poem about {p} {e}.
Write a sad story with a happy ending about {p} {e}.
Write a scene for the stage: {p} {e}.
Write a story about {p} {e}. It should end with a surprise.""")

TRAIN_RECIPIENTS = phrases("""
my landlord; my grandmother; my new neighbour; a customer; my boss; a former teacher; the city
council; a friend abroad; my little brother; a hotel; the school principal; an airline; a job
applicant; my doctor; a pen pal; my team; the editor of a magazine; a local charity""")

TRAIN_REASONS = phrases("""
to say thank you for their help; to apologise for a late reply; to complain politely about the
noise; to ask for more time; to share good news; to invite them to dinner; to explain why I cannot
come; to ask for a recommendation; to congratulate them; to report a problem with an order; to
propose a meeting next week; to ask for advice; to offer my help; to say that I am moving away; to
ask about opening hours and prices; to tell them about my summer""")

TRAIN_LETTERS = lines("""
Write a letter to {p} {e}.
Write a short and friendly email to {p} {e}.
Help me write a formal letter to {p} {e}.
I want to write to {p} {e}. What should I say?""")

TRAIN_SENTENCES = phrases("""
Me and him was going to the store when it start raining.; The meeting has been moved to Thursday
because the manager is ill.; We are very unhappy with the service that we received in your shop.;
She don't like neither the red dress nor the blue one.; The results of the experiment were not what
we had expected.; I can't come tomorrow, my car is broken again and the garage is closed.; The
weather was nice and the food was nice and the people were nice.; Your payment is late and you must
pay now.; There is many reasons why people moves to the city.; Despite of the rain, they continued
to work in the field.; The new rules will make it easier for students to choose their courses.; He
told me that he will call yesterday but he forgot it.; Our company makes good products for good
people.; The dog chased the cat up the tree and the cat stayed there all night.; If I would have
known about the party, I would have came.; The old bridge was closed for repairs and nobody told the
drivers.""")

TRAIN_EDITS = lines("""
Rewrite this sentence so that it sounds more formal: "{s}"
Correct the mistakes in this sentence and explain them: "{s}"
Say the same thing in three other ways: "{s}"
Turn this sentence into a short paragraph: "{s}"
Rewrite this in a friendlier tone: "{s}"
Is there anything wrong with this sentence? "{s}"
Write a short story that begins with this sentence: "{s}\"""")

TRAIN_SMALL_TALK = phrases("""
Hi! How are you today?; What can you do for me?; Tell me a joke and explain why it is funny.; I am
bored. What should I do this afternoon?; What should I cook tonight? I have eggs, potatoes and an
onion.; I had a bad day. Can you cheer me up?; Can you help me plan my weekend?; What is a good
present for my mother?; Give me a riddle.; Recommend a hobby for somebody who likes quiet evenings.;
I cannot sleep. What can I do?; What is your favourite season, and why?; Help me choose a name for
my new dog.; Tell me something I do not know.; Let's play a game with words. You start.; What would
you do with a million dollars?""")

TRAIN_FOLLOW_UPS = phrases("""
Can you give me an example?; Can you make that shorter?; Can you say more about the first point?;
Why is that?; I do not understand. Please explain it again in easier words.; Now write it as a
list.; Now write it as a poem.; What is the most important thing to remember?; Please write a longer
version.; What are the disadvantages?; How would you explain this to a child?; Are you sure about
that? Please check it again.; Give me two more examples.; Can you write a conclusion?; What should I
read next?; Now turn this into a short story.; Make it funnier.; Make it sound more serious.; What
would an expert say about that?; Is there another way to look at it?; Write a title and a short
summary for your answer.; Ask me three questions to test whether I understood.; And what about the
costs?; How did people do this in the past?; Thank you. What else should I know about {t}?; How does
{t} affect my daily life?; What do most people get wrong about {t}?; Can you tell me a short story
about {t}?; Write three sentences about {t} that I could use in a letter.; What is the hardest part
of {t}?""")

TRAIN_CODE = phrases("""
returns the largest even number in a list; counts the vowels in a string; reverses the words of a
sentence; checks whether a string is a palindrome; returns the n-th Fibonacci number; computes the
factorial of a number; merges two sorted lists; removes duplicates from a list and keeps the order;
finds the second largest number in a list; checks whether a number is prime; returns all prime
numbers below n; converts Celsius to Fahrenheit; counts how often each word occurs in a text; finds
the longest word in a sentence; sorts a list of dictionaries by a key; flattens a nested list;
computes the greatest common divisor of two numbers; converts a number to binary; converts a Roman
numeral to an integer; checks whether two words are anagrams; rotates a list by k places; finds the
missing number in the range from 1 to n; computes the average of a list; computes the median of a
list; returns the transpose of a matrix; multiplies two matrices; searches a sorted list with binary
search; implements bubble sort; implements quick sort; implements merge sort; implements insertion
sort; checks whether brackets are balanced; compresses a string by counting repeated letters;
validates an email address; generates a random password; computes compound interest; counts the
lines in a file; reads a CSV file and returns its rows; writes a dictionary to a JSON file; returns
the intersection of two lists; groups words by their first letter; finds all pairs that add up to a
given sum; capitalises every word in a title; removes punctuation from a text; counts the days
between two dates; tells whether a year is a leap year; returns the digits of a number in reverse;
sums the digits of a number; finds the most common element in a list; splits a list into chunks of a
given size; computes the distance between two points; computes the area of a circle; simulates
rolling two dice; plays rock, paper, scissors; implements a stack; implements a queue with two
stacks; implements a linked list; finds the depth of a binary tree; traverses a binary tree in
order; finds the shortest path in a grid; computes all permutations of a string; computes all
subsets of a set; encrypts a text with the Caesar cipher; decodes Morse code; draws a pyramid of
stars; prints the multiplication table; converts seconds to hours, minutes and seconds; counts the
islands in a grid; finds the longest common prefix of a list of strings; computes the edit distance
of two words; checks a Sudoku row; returns the running sum of a list; replaces every third letter
with a star; filters the negative numbers out of a list; zips two lists into a dictionary; computes
the dot product of two vectors; finds the first letter that does not repeat""")

TRAIN_CODE_REQUESTS = lines("""
Write a Python function that {t}.
Write a Python function that {t}. Include a docstring and an example.
I need a Python function that {t}. Please explain the code line by line.
Can you write a Python function that {t} without using any library?
How would I write a Python function that {t}?
Write a Python function that {t}, then write three unit tests for it.
Write a JavaScript function that {t}.
Write a short Python program with a function that {t}. Add comments.
Show me two ways to write a Python function that {t}, and compare them.
I am a beginner. Help me write a function that {t}.
Write a Python class with a method that {t}.
Describe in words how a function that {t} works, then write it in Python.""")

TRAIN_TASK_REQUESTS = lines("""
Write a Python function that solves this task: {t}
{t} Write a Python function for it.
Help me solve this problem with Python: {t}
How would you solve the following problem? Describe the steps first, then write the code. {t}
{t}""")

TRAIN_WHOLE_CODE = lines("""
{task} Here is a Python solution:|Explain how this code works.
Task: {task}|What does the main function return, and how?
{task} Please review this solution:|Suggest improvements.
{task}|Describe the steps of this program in plain words.
Add comments to the following code. Its task: {task}|
Look at this code. {task}|Give an example of an input and the output.""")

TRAIN_CUT_CODE = lines("""
{task} This is the beginning of a solution:|Complete the code.
{task} I started like this:|Explain what I have so far and finish it.
Task: {task} Here are the first lines of a program:|How does it go on?""")

# --------------------------------------------------------------------------------- held-out prompts
HELD_OUT_CODE = lines("""
Write a Python function `bowling_score(rolls)` that scores a complete game of ten-pin bowling, spares and strikes included.
Implement a small bank account class in Python with deposit, withdraw and a statement of all movements.
In Python, turn a list of clock times such as "07:45" into the total number of minutes that passed between them.
Please write Python code that finds the tallest stack of boxes when a box may only stand on a heavier one.
Write a Python generator that yields the look-and-say sequence 1, 11, 21, 1211 and so on, and explain why it works.""")  # noqa: E501

HELD_OUT_GENERAL = lines("""
Why does bread go stale faster in the fridge than on the kitchen counter?
How do noise-cancelling headphones manage to make a room quiet?
How can I remove a red wine stain from a wool carpet? Tell me what to do first, second and third.
What is the placebo effect, and how do doctors take it into account in a trial?
How do I change a flat tyre at the side of a busy road without putting myself in danger?""")

HELD_OUT_WRITING = lines("""
Write a ghost story set in a lift that stops between two floors, told by the caretaker.
Write a farewell toast for a postwoman who has delivered mail on the same island for forty years.
Write a product description for an umbrella that hums when rain is near.
Write a monologue of a chess pawn on the evening before the game.
Write a review of a restaurant where every dish is served in the dark.""")

# --------------------------------------------------------------------- sessions that follow a topic
SESSION_TOPICS = phrases("""
lighthouses; coral reefs; the Silk Road; sourdough bread; chess; volcanoes; penguins; glassblowing;
Roman aqueducts; night photography; jazz; origami; earthquakes; submarines; the Amazon rainforest;
the printing press; marathon running; perfume; castles; comets""")

SESSION_OPENERS = lines("""
I would like to talk about {t} for a while. Please begin with an overview.
Today I want to understand {t} properly. Give me a first picture.
Let us spend this conversation on {t}. What would you tell a newcomer first?
For a long project I am collecting material on {t}. Start with the basics, please.""")

# ">>" joins two turns of which the second needs the first.
SESSION_FOLLOW_UPS = phrases("""
Where does the story of {t} begin?; Which misunderstanding about {t} annoys specialists the most?;
Describe a morning in the life of a person whose work has to do with {t}.; What does a beginner
notice first, and what does an expert notice first?; Put what you just said into one plain sentence,
then defend it.; Which three numbers tell us the most about {t}?; What role has luck played here?;
Paint me a picture in words: what do you see, hear and smell?; If I had one free afternoon to learn
about {t}, how should I spend it?; Which tools or instruments belong to this, and what is each one
for?; Let us go deeper. What happens below the surface?; What did people two hundred years ago
believe about {t}?; Which questions about {t} are still open?; Think of a sceptic. What would be the
strongest objection to your last answer? >> And how would you reply to that objection?; Invent a
short anecdote that shows the point.; What connects {t} with the sea?; What connects {t} with music
or painting?; How do children usually first hear of {t}?; Which country has the closest relationship
with {t}, and how did that come about?; Walk me through the whole process from start to finish.; At
which stage do things most often fail?; What would a safety inspector look at?; How has technology
changed {t} during the last fifty years? >> What was lost because of that change?; Write the text of
a small museum sign about {t}.; Write a postcard from somebody who travelled far to see this.;
Compare {t} with something from an ordinary kitchen.; How does the season or the weather matter
here?; What does all this cost, roughly, and who pays for it?; Who earns a living from {t} today?;
Name a person, real or typical, who gave years of their life to {t}, and tell me about them.; What
vocabulary should I learn? Five terms with their meanings, please.; Suppose that money were no
object. What would you build or study?; Suppose that we had to do without {t} for a year. What would
change?; What advice would you give to a teacher who plans a lesson on {t}?; Suggest an experiment
or a small exercise that I could try at home.; What might {t} look like a hundred years from now?;
Tell me about a famous failure in this field. >> And now about a great success.; Which rule of thumb
do practitioners use most?; Explain the physics or chemistry behind it as far as you can.; In what
ways can {t} change the people who spend years on the subject?; What is beautiful about {t}?; What
is dangerous about {t}?; Which laws or customs apply?; How would a journalist begin a long report on
{t}? >> Please continue that report with a second paragraph.; Give me a scene for a film in which
{t} is the background.; What would you show a visitor who has only ten minutes?; Which animals or
plants have something to do with this?; How do we know all that? Tell me about the evidence.; What
is the difference between good and excellent here?; Draw up a timeline with six entries.; Which
detail of {t} is nearly always left out?; What would you ask a specialist over lunch?; Let me guess:
most of it is tradition. How far am I right?; How could somebody with little strength or poor
eyesight take part?; Collect what we have said so far about {t} in a few lines.; Close this part
with a thought that I can take home.""")

# ---------------------------------------------------------------------- sessions of unrelated turns
MIXED_SUBJECTS = phrases("""
barometers; the Dead Sea; lifts and escalators; zippers; saffron; fog; monsoons; lullabies; postage
stamps; hiccups; kites; tunnels; ferries; the northern lights; moss; suspension bridges; windmills;
candles; fireworks; Braille; deserts; snowflakes; umbrellas; clock towers; snails; olive oil;
mirrors; icebergs; compasses; pencils; bamboo; crossword puzzles; barcodes; thunderstorms; cinnamon;
puppets; quicksand; parachutes; typewriters; hot-air balloons; fossils; maple syrup; dreams; wool;
cheese; salt mines; spectacles; sundials""")

MIXED_QUESTIONS = lines("""
Where on Earth would you go to learn about {t}, and what would you look for?
Invent a riddle about {t} and solve it.
Which inventions would be missing if nobody had ever thought about {t}?
Write a headline and two paragraphs of news about {t}.
Three people argue about {t} at a bus stop. What do they say?
Which two facts about {t} would win a pub quiz?
Somebody claims that {t} will be forgotten in fifty years. Give your view.
What does a scientist see in {t} that other people overlook?
Write a museum guide's welcome to a room full of things about {t}.
How would you sell {t} to a person who has everything?
Write a limerick about {t}, then say what makes it a limerick.
Draft the script of a ninety-second film on {t}.
What could a company learn from {t}?
Which dangers come with {t}, if any, and how do people handle them?
Describe {t} without using any adjective, then with as many as you like.
Make up a proverb about {t} and tell where it could come from.
Where might {t} turn up in an old tale, and with what meaning?
Which senses do we use to recognise {t}? Go through them in turn.
Please clear this up for me: what do beginners confuse when they hear about {t}?
Plan a rainy-day project for two children about {t}.
Pretend to be a tour guide from the year 2200 who explains {t} to visitors.
Which trades and professions depend on {t}? Describe one of them closely.
Name the biggest open question about {t} and how one might settle it.
Write a message in a bottle that mentions {t}.""")

MIXED_CODE = phrases("""
adds up the ticket prices of a family with reduced fares for children; deals hands of five cards
from a shuffled deck; prints the month as a calendar grid; finds the nearest bus stop in a list of
coordinates; turns a shopping list into totals per shop; lets two players take turns at noughts and
crosses; tells how many coins are needed for an amount of change; checks an ISBN by its last digit;
scales a recipe from four to any number of guests; keeps the ten best scores of a game; measures how
fast a person types a sentence; spells out a number in English words; warns when the stock of an
article runs low; replaces swear words by asterisks; plans a round-robin tournament; works out the
tip and splits the bill; draws a horizontal bar chart with plain text; simulates a traffic light;
remembers the last five searches; wraps a long text at forty characters; turns RGB values into a hex
colour; estimates pi by throwing random darts; lists the files of a folder by size; guesses a secret
number with as few questions as possible; shortens a web address to six letters; computes a body
mass index and comments on it; parses a log line into date, level and message; assigns seats in a
theatre row; lets an ant walk on a chessboard; tracks how much water somebody drank today; converts
a pace per kilometre into a finish time; sorts library books by shelf mark; finds free slots in two
diaries; evaluates a small sum such as 3 + 4 * 2; shuffles a playlist without playing one artist
twice in a row; calculates the phase of the moon; undoes and redoes changes in a text; counts votes
and reports a tie; expands abbreviations in a text message; generates a maze""")

MIXED_CODE_REQUESTS = lines("""
Please program something in Python that {t}. Keep it under thirty lines.
I want a tool that {t}. Sketch the design, then give the Python code.
Code request: Python, something that {t}, with clear variable names.
Which data structures suit a program that {t}? Answer with code.
Give me clean Python that {t}, and mention one edge case.
For a workshop I need a worked example: code that {t}.""")
