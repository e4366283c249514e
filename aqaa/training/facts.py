"""Word lists of the mini curriculum: facts a child knows, in words of a recogniser's dictionary."""

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(n):
    """English words of an integer 0..100, for example 35 -> "thirty five"."""
    if not 0 <= n <= 100:
        raise ValueError(f"number() spells 0 to 100, not {n}")
    if n == 100:
        return "one hundred"
    if n < 20:
        return _UNITS[n]
    tens, unit = divmod(n, 10)
    return _TENS[tens - 2] + (f" {_UNITS[unit]}" if unit else "")


def _pairs(text):
    return tuple(tuple(pair.split()) for pair in text.split(","))


DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()

# Asked in both directions.
OPPOSITES = _pairs(
    "hot cold,big small,up down,day night,old young,rich poor,full empty,early late,wet dry,strong weak,"
    "left right,clean dirty,black white"
)

PLURALS = _pairs(
    "mouse mice,foot feet,tooth teeth,child children,goose geese,knife knives,wolf wolves,leaf leaves,"
    "city cities,baby babies,box boxes,fox foxes,bus buses,dog dogs,tree trees,house houses,apple apples,book books,"
    "lady ladies,potato potatoes,friend friends"
)

SPELLED = "cat dog sun hat bus pig cup bed fish bird milk moon star tree book door ship frog lamp rain".split()

CAPITALS = _pairs(
    "france paris,germany berlin,spain madrid,italy rome,england london,japan tokyo,china beijing,russia moscow,"
    "egypt cairo,greece athens,ireland dublin,austria vienna,cuba havana,kenya nairobi,norway oslo,canada ottawa,"
    "poland warsaw,portugal lisbon"
)

COLORS = _pairs(
    "grass green,snow white,coal black,blood red,banana yellow,carrot orange,chocolate brown,"
    "elephant gray,flamingo pink,milk white,lettuce green,mud brown,tomato red,gold yellow,ocean blue,"
    "sky blue,honey yellow,cherry red"
)

SOUNDS = _pairs(
    "dog barks,cow moos,duck quacks,lion roars,snake hisses,bee buzzes,wolf howls,bird sings,turkey gobbles,"
    "mouse squeaks,pig grunts,owl hoots,rooster crows,kitten purrs,bear growls"
)

# The odd one out of three: two of one group, one of another.
GROUPS = {
    "fruits": "apple banana cherry lemon".split(),
    "animals": "horse tiger rabbit monkey".split(),
    "colors": "green yellow purple blue".split(),
    "clothes": "jacket shirt sweater shoe".split(),
}

# Said back in a manner; five to eight words, unlike one another.
SENTENCES = (
    "the cat sleeps on the kitchen table",
    "we walk to school every morning",
    "my brother likes warm chocolate milk",
    "the train leaves at seven tonight",
    "a little bird sits in the tree",
    "please open the window and the door",
    "the moon is bright over the hills",
    "i have lost my yellow umbrella",
    "she plays the piano after dinner",
    "the farmer feeds his chickens at dawn",
    "our teacher reads a funny story",
    "the river runs down to the ocean",
    "he found a penny in the garden",
    "my sister painted the old fence",
    "winter brings snow to the mountains",
    "the baker makes fresh bread today",
    "they built a castle out of sand",
    "the children dance around the fire",
    "grandmother keeps honey in the basement",
    "a big green truck passed by slowly",
    "i will call you again on sunday",
    "the doctor gave me some good advice",
    "nobody knows where the rabbit went",
    "the soup is hot and very good",
    "we saw three elephants at the zoo",
    "this house has a wooden roof",
    "the captain looked across the water",
    "put your shoes under the chair",
    "the music was soft and lovely",
    "summer is my favorite time of year",
    "it is raining in the city tonight",
    "the little dog ran after the ball",
)

ECHOED = (
    "banana hello window pepper garden rabbit orange yellow summer dinner paper silver water tiger river pencil"
).split()

# Openers and closers that go round a core; questions and commands take different openers.
ASKING = (
    "", "please tell me", "can you tell me", "i would like to know", "hey", "okay", "so", "my question is", "tell me",
    "good morning", "hello there", "do you know", "i wonder", "listen", "one more question", "well", "let me ask you",
    "answer this",
)
ORDERING = (
    "", "please", "can you", "could you", "i want you to", "hey", "okay now", "would you", "now", "i would like you to",
    "hello there", "next", "listen", "will you please", "good morning please", "well then", "go on and",
)
CLOSERS = ("", "please", "thank you", "for me", "if you can", "my friend", "now")

# A small grammar of everyday sentences, for speech recognition only.
SUBJECTS = (
    "the boy,the girl,my mother,her father,the old man,a young woman,the teacher,our neighbor,the king,a soldier,"
    "the small dog,his uncle,the driver,every student,one of them,the queen,that lady,my best friend,the people,nobody"
).split(",")
VERBS = (
    "saw,wanted,carried,found,bought,forgot,followed,watched,remembered,painted,cleaned,opened,touched,liked,lost,"
    "brought,described,noticed,needed,washed,picked up,looked at,talked about,asked for,thought of"
).split(",")
OBJECTS = (
    "the letter,a red bicycle,some fresh bread,the broken clock,a heavy box,the blue flower,his coat,two tickets,"
    "a long rope,the empty bottle,her picture,the white horse,a piece of cheese,the front gate,an old song,"
    "a strange noise,the television,their money,five oranges,the whole story,a glass of juice,the quiet village"
).split(",")
PLACES = (
    "in the garden,near the bridge,at the station,behind the church,on the road,under the stairs,by the lake,"
    "after the game,before breakfast,during the night,last week,without a word,with great care,in the morning,"
    "at the market,for a while,in the forest,across the street,beside the river,on the first day"
).split(",")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
