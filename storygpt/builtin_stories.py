"""A seeded story grammar: the built-in offline stand-in for the TinyStories data set.

Every story is original to this file. It names one hero and one object in its opening and both
again in its last sentence, so that whether a model keeps hold of them can be checked by a script.
"""

import random
import re
from collections.abc import Iterator

# Names that a small vocabulary can tell apart by their first token.
GIRLS = [
    "Lily", "Mia", "Anna", "Zoe", "Amy", "Kate", "Sara", "Beth", "Nina", "Jane", "Iris", "Fern",
    "Clara", "Grace", "Cara", "Una", "Alice",
]
BOYS = [
    "Tom", "Ben", "Sam", "Jack", "Adam", "David", "John", "Paul", "George", "Dan", "Peter",
    "Mark", "James", "Frank", "Stan", "Hank", "Walt",
]
HEROES = frozenset(GIRLS + BOYS)

SHE = {"he": "she", "his": "her", "him": "her", "child": "girl"}
HE = {"he": "he", "his": "his", "him": "him", "child": "boy"}

# What one does with each thing, now and in the past, and how it may look.
THINGS = {
    "kite": ("fly", "flew", "red|blue|yellow|green"),
    "ball": ("kick", "kicked", "red|blue|yellow|green"),
    "boat": ("sail", "sailed", "red|blue|white|little"),
    "drum": ("bang", "banged", "red|blue|big|little"),
    "bell": ("ring", "rang", "gold|silver|shiny|little"),
    "flute": ("play", "played", "silver|green|little"),
    "hat": ("wear", "wore", "red|blue|green|tall|soft"),
    "scarf": ("wear", "wore", "red|blue|green|long|soft"),
    "coat": ("wear", "wore", "red|blue|green|warm"),
    "crown": ("wear", "wore", "gold|silver|shiny"),
    "mask": ("wear", "wore", "funny|green|silver"),
    "blanket": ("sleep under", "slept under", "red|blue|yellow|soft"),
    "book": ("read", "read", "red|blue|big|old"),
    "doll": ("hug", "hugged", "little|pretty|soft"),
    "robot": ("play with", "played with", "silver|red|little|funny"),
    "train": ("push", "pushed", "red|blue|green|long"),
    "wagon": ("pull", "pulled", "red|blue|green|little"),
    "sled": ("ride", "rode", "red|blue|green|fast"),
    "bike": ("ride", "rode", "red|blue|green|shiny"),
    "lamp": ("light", "lit", "little|green|yellow|old"),
    "pot": ("look at", "looked at", "blue|white|pretty|old"),
    "clock": ("look at", "looked at", "old|gold|white|pretty"),
    "purse": ("carry", "carried", "red|brown|little"),
    "key": ("carry", "carried", "gold|silver|little|old"),
    "stone": ("look at", "looked at", "green|blue|smooth|shiny"),
    "card": ("make", "made", "pretty|pink|yellow|big"),
    "picture": ("make", "made", "pretty|big|bright"),
    "quilt": ("make", "made", "pretty|warm|blue|soft"),
    "tower": ("build", "built", "tall|big|strong"),
    "castle": ("build", "built", "tall|big|grand"),
    "bridge": ("build", "built", "long|little|strong"),
    "tent": ("build", "built", "big|little|cozy"),
    "fort": ("build", "built", "big|strong|secret"),
    "flower": ("grow", "grew", "red|blue|yellow|pretty"),
    "rose": ("grow", "grew", "red|pink|white|yellow"),
    "carrot": ("grow", "grew", "big|long|sweet"),
    "melon": ("grow", "grew", "big|green|sweet"),
    "cake": ("bake", "baked", "big|round|sweet"),
    "pie": ("bake", "baked", "big|round|sweet"),
    "soup": ("cook", "cooked", "big bowl of|warm bowl of"),
    "kitten": ("pet", "petted", "little white|little black|tiny gray"),
    "lamb": ("pet", "petted", "little white|little black|tiny white"),
    "duck": ("pet", "petted", "little white|little brown|tiny yellow"),
}

# Symbols are drawn once per story, so that a place or a helper stays the same throughout.
SYMBOLS = {
    "friend": ["Leo", "Noah", "Eli", "Andy", "Gus", "Emma", "Ruth", "Vic", "Quinn", "Rex",
               "Sean", "Isa", "Ash"],
    "kin": ["Mom", "Dad", "Grandma", "Grandpa"],
    "animal": ["mouse", "rabbit", "frog", "owl", "fox", "bird", "turtle"],
    "climber": ["squirrel", "bird", "crow", "owl", "cat"],
    "kind": ["little", "old", "wise", "friendly", "gray"],
    "owner": ["an old man", "an old woman", "a tall man", "a young woman"],
    "place": ["the park", "the garden", "the yard", "the big field", "the hill"],
    "spot": ["under the old tree", "in the tall grass", "by the gate", "behind the shed",
             "under the bench", "next to the pond", "behind a big rock", "in the hay"],
    "high": ["on the roof", "in a tall tree", "on a high wall", "on a high branch"],
    "trap": ["in a deep hole", "in the mud", "under a thorny bush", "behind a fence"],
    "cause": ["a branch at the window", "the cat at the door", "the rain on the roof",
              "a moth on the glass", "the wind at the door"],
    "treat": ["cookies", "plums", "apples", "berries", "nuts"],
    "pretend": ["a ship", "a mountain", "an island", "a dark cave"],
    "role": ["a dragon", "a giant", "a king", "a lion", "a pirate"],
    "job": ["swept the floor", "fed the hens", "picked the apples", "washed the dishes",
            "pulled the weeds", "carried the wood"],
    "one_day": ["one sunny morning", "one windy day", "one cold day", "one day", "one afternoon",
              "one bright morning", "one quiet day"],
    "sad": ["{He} wanted to cry.", "A tear ran down {his} nose.", "{He} felt very sad.",
            "{His} eyes filled with tears.", "{He} sat down with a long sigh."],
    "joy": ["{He} jumped up and down.", "{He} laughed out loud.", "{His} heart felt light.",
            "{His} smile was as wide as the sky.", "{He} danced in a circle."],
    "own": ["Once there was a [little|kind|happy] {child} named {hero} who had {a_thing}.",
            "{hero} had {a_thing} and loved to {use} it [every day|after lunch|all the time].",
            "{hero} was a [little|kind|busy] {child} with {a_thing}.",
            "Of all {his} things, {hero} loved {his} {look} {thing} [best|the most].",
            "{kin} gave {hero} {a_thing}, and {he} [loved it at once|took it everywhere]."],
}


def plain(things: str) -> dict[str, str]:
    """Things a plot can be about when it need not know more about them."""
    return dict.fromkeys(things.split(), "")


# Each plot: the things it suits, with a {detail} about each, and its beats. "- " opens a beat,
# each further line is another way to tell it, and [a|b] is a choice of words.
PLOTS = {
    "lost": (plain("kite ball boat drum bell hat scarf doll robot book"), """
- {own}
- But {one_day} the {thing} was gone. {hero} looked under the bed and behind the [door|chair].
  But {one_day} {he} wanted to {use} the {thing}, and it was not there. {sad}
  But {one_day} {he} came home from {place} without the {thing}. {sad}
- {friend} came to help. "[Four eyes are better than two|We will find it]," said {friend}.
  "Think back," said {kin}. "Where did you have the {thing} last?"
  {A_kind} {animal} came by. "I saw {a_thing} {spot}," said the {animal}.
- {hero} ran to look {spot}. There was the {thing}, [safe and dry|wet but not broken]!
  They looked {spot}, and there it was. "My {thing}!" [cried|shouted] {hero}.
- {joy} "Thank you for [helping me|your help]!" {he} said.
  {hero} held it [tight|close]. "I [missed|looked for] you," {he} told the {thing}.
- From then on, {hero} always put the {thing} back [on the shelf|in its place|by {his} bed].
  That night, {hero} went to sleep with the {look} {thing} [beside {him}|next to {his} bed].
  {hero} was so glad to have the {thing} back that {he} [sang|danced|smiled] all the way home.
"""),
    "share": (plain("kite ball boat drum wagon train doll robot sled bike"), """
- {own}
- {One_day}, {friend} came to play. "May I {use} the {thing} too?" asked {friend}.
  {One_day}, {friend} saw the {thing}. "[Oh, how nice|I like it]! May I have a turn?"
- "No, it is my {thing}," said {hero}. {friend} looked [sad|down] and [walked|went] away.
  {hero} shook {his} head. "It is [only for me|just mine]," {he} said. {friend} went home.
- {hero} {used} the {thing} alone, but it was [not much fun|no fun at all].
  {kin} saw it all. "A {thing} is more fun with a friend," said {kin} [softly|kindly].
- So {hero} ran to {friend}. "I am sorry," {he} said. "You can {use} the {thing} [now|first]."
  Then {hero} [had an idea|felt sorry]. "Come back, {friend}! Let's share the {thing}!"
- {hero} and {friend} shared the {look} {thing} until [the sun went down|it was time for supper].
  That day {hero} learned that a {thing} is [twice as nice|the most fun] when you share it.
  When the stars came out, {hero} and {friend} were still [playing|happy] with the {thing}.
"""),
    "quarrel": (plain("ball kite drum hat doll crown mask"), """
- {One_day}, {hero} and {friend} found {a_thing} {spot}.
  {hero} was playing with {friend} when they saw {a_thing} {spot}.
- "I saw it first!" said {hero}. "No, I did!" said {friend}.
  "The {thing} is mine!" said {hero}. "No, it is mine!" [said|cried] {friend}.
- {hero} pulled and {friend} pulled. [Bump|Splash]! They both fell in the mud with the {thing}.
  They pulled [and pulled|this way and that]. Plop! The {thing} fell in the mud.
- "I am sorry I [shouted|pulled]," said {hero}. "I am sorry too," said {friend}.
  "Let's not fight," said {friend}. "You are [my friend|more fun than a {thing}]."
- They washed the {thing} [in the pond|with warm water] and made a plan to take turns.
  "You can have it today, and I can have it tomorrow," said {hero}. {friend} [nodded|agreed].
- All week, {hero} and {friend} took turns with the {look} {thing} and [did not fight|had fun].
  {hero} liked the {thing}, but {he} liked [having|being] a good friend even more.
  After that, the {thing} belonged to both {hero} and {friend}, and all was well.
"""),
    "broken": ({"wagon": "wheel", "train": "wheel", "bike": "wheel",
                "kite": "tail", "boat": "sail", "doll": "arm", "robot": "arm"}, """
- {own}
- {One_day}, the {thing} fell [hard|to the ground], and the {detail} came off. {sad}
  {One_day}, {he} heard a [crack|snap]. The {detail} of the {thing} was broken! {sad}
- "Do not cry," said {kin}. "[We can fix it|The {detail} can be mended]."
  "You and I can mend [this|the {thing}] together," said {kin} [softly|with a smile].
- They found some [glue|string|tape], and {hero} held the {detail} [still|in place].
  They sat at the table. {kin} showed {him} how, and {hero} put the {detail} back.
- "Is it [ready|done]?" asked {hero}. "Yes," said {kin}. "[Try it|Go and see]!" {joy}
  At last the {thing} was [as good as new|whole again]. {joy}
- {hero} [hugged|thanked] {kin} and {used} the {look} {thing} [until dark|all afternoon].
  Now {hero} loved the {thing} even more, because {he} had fixed it with {his} own hands.
  From that day on, {hero} was [gentle|careful] with {his} {look} {thing}.
"""),
    "gift": ({"card": "paper", "picture": "paint", "quilt": "cloth", "scarf": "wool",
              "hat": "wool", "crown": "shiny paper", "mask": "paper"}, """
- It was almost {kin}'s birthday, and {hero} wanted to make {a_thing}.
  {hero} wanted to give {kin} {a_thing}, but {he} had no money.
  {hero} loved {kin} [very much|a lot] and wanted to make {a_thing} as a gift.
- "I will make it all by myself," {he} said, and {he} [found|got] some {detail}.
  {He} found some {detail} and [sat down at the table|went to work] [right away|at once].
- But the first {thing} was too [big|small], and the next one was too [long|thin].
  But it was hard, and the {thing} [came out all wrong|looked like a pancake]. {sad}
- "Go slow," said {friend}. "A {thing} needs time." So {he} [tried|started] again.
  {A_kind} {animal} looked in at the window. "Try once more," said the {animal}.
- {hero} worked [all morning|until lunch|for two days]. At last, the {thing} was done!
  Bit by bit, the {thing} grew [better|nicer], and {hero} sang as {he} worked.
- "For me?" asked {kin}. "What a [lovely|beautiful|wonderful] {thing}!"
  "Surprise!" {he} said. {kin} [laughed|smiled] with joy. "I love this {thing}!"
- {kin} gave {hero} a big hug and kept the {look} {thing} [forever|for years and years].
  {hero} felt [proud|warm inside], because {his} {thing} had made {kin} [smile|so happy].
"""),
    "learn": ({"bike": "{he} fell into the grass", "sled": "{he} rolled into the snow",
               "kite": "it fell on {his} head", "flute": "it sounded like a sick cow",
               "drum": "all the birds flew away",
               "ball": "it went the wrong way"}, """
- {kin} gave {hero} {a_thing}, but {he} did not know how to {use} it.
  {hero} had {a_thing}, and {he} wanted to learn to {use} it [well|like {friend}].
- {One_day}, {he} took the {thing} to {place}. {He} tried, but {detail}.
  {He} tried to {use} the {thing}, but {detail}. {He} tried again, and {detail} again.
- "I can't do it!" [cried|said] {hero}. {sad}
  {hero} put down the {thing}. "It is too hard for me," {he} said.
- "I could not do it at first," said {kin}. "[Try a little each day|You will learn]."
  {A_kind} {animal} was watching. "I could not [run|swim|jump] at first," it said. "Try again."
- So {hero} tried the next day, and the next. Then {he} {used} the {thing} just right!
  Day after day {he} tried. Then it worked! "Look, I can {use} the {thing}!" called {hero}.
- {hero} {used} the {look} {thing} all the way [around|across] {place} and felt [proud|very big].
  Now {hero} {used} the {thing} every day, and it [was|felt] as easy as [singing|smiling].
"""),
    "dark": (plain("doll lamp blanket robot book"), """
- {hero} was afraid of the dark, but {he} had {a_thing} [next to|beside] {his} bed.
  Every night, {hero} went to bed with {a_thing} [close to|beside] {him}.
  {hero} was a [little|kind|quiet] {child} who kept {a_thing} by {his} bed.
- One night there was a sound. [Tap, tap, tap|Bump, bump, bump]! {He} sat up in bed.
  One night {he} woke up. The room was [very|all] dark, and something went [bump|tap, tap].
- "Is it a [monster|ghost]?" {he} whispered. {hero} held the {thing} [close|tight].
  {hero} hid under the covers with the {thing}. {His} heart went thump, thump, thump.
- "Do not be afraid," {he} told the {thing}. "We will look [together|and see]."
  {He} took a deep breath. "With my {thing} I can be brave," {he} said.
- Step by step, {hero} went to look. It was only {cause}! {joy}
  {He} walked on {his} toes across the cold floor. And what was it? Just {cause}!
- Then {hero} closed {his} eyes and slept until morning with the {thing} [beside|near] {him}.
  After that, {hero} and the {look} {thing} were not afraid of the dark [any more|at all].
"""),
    "rain": (plain("train doll book crown boat robot blanket"), """
- It rained and rained, so {hero} had to stay inside with {a_thing}.
  One rainy day, {hero} sat by the window with {a_thing}. [Drip, drop|Splash], went the rain.
- "Let's pretend!" said {kin}. "Your {thing} can be [magic|a brave friend]."
  "A rainy day can be fun," said {kin}. "Let's [make up a game|pretend] with your {thing}!"
- Soon the bed was {pretend}, and the {thing} was [lost there|the king of it all].
  {hero} [jumped|climbed] onto the bed. Now it was {pretend}, and the {thing} was [safe|magic]!
- {kin} played {role}. "[Grr|Ho, ho]! Give me that {thing}!" said {kin}. {hero} [laughed|ran].
  {friend} came over and played {role}. "You can't catch us!" [shouted|cried] {hero}.
- They played so long that nobody saw the rain stop. [The sun was out|A rainbow came out]!
  Then the sun came out. The rain was over, but {hero} did not want to stop.
- That night, {hero} put the {look} {thing} to bed and hoped it would rain again [soon|tomorrow].
  {hero} held the {thing} up to the window, and they looked at the [blue sky|wet world] together.
  {hero} hugged the {look} {thing} and thought that rain was [not so bad|the best of all].
"""),
    "build": ({"tower": "blocks", "castle": "sand", "bridge": "sticks and stones",
               "tent": "sheets and chairs", "fort": "old boxes"}, """
- {One_day}, {hero} wanted to build {a_thing} [out of|with] {detail}.
  {hero} had a big plan. {He} wanted to build {a_thing} out of {detail}.
  {hero} and {friend} wanted to build {a_thing} out of {detail}.
- {He} got some {detail}, and {friend} came to help. The {thing} got bigger and bigger.
  {He} worked fast, and {friend} worked fast. "[What a {thing}|Look at it]!" said {friend}.
- But then, crash! [Down|Over] went the {thing}. {sad}
  Then the wind blew hard, and the {thing} fell [down|over]. "Oh no!" [cried|said] {hero}.
- {hero} [was angry|shouted] at {friend}. Then {he} saw {friend}'s sad eyes and said, "I am sorry."
  "Never mind," said {friend}. "[We can try again|We will make a better one]."
  {A_kind} {animal} came to look. "Make it wide at the bottom," said the {animal}.
- So they began again. {hero} went slowly, and {friend} held everything in place.
  [Bit by bit|Little by little], they made a new {thing}, and this one did not fall.
- {hero} and {friend} sat by their {look} {thing} and [ate {treat}|told stories] until dark.
  {hero} was [proud|glad], for two friends can build a better {thing} than one.
"""),
    "garden": (plain("flower rose carrot melon"), """
- {hero} had a tiny seed, and {he} wanted to grow {a_thing}.
  {kin} gave {hero} a [tiny|little] seed. "It can grow into {a_thing}," said {kin}.
  {One_day}, {hero} put a seed in the ground to grow {a_thing}.
- {He} gave it water and waited. "Where is my {thing}?" asked {hero}. "I want it now!"
  Every morning {he} ran out to see the {thing}, but there was [nothing|only dirt]. {sad}
  But nothing came up. "Is my {thing} [lost|asleep]?" asked {hero}. {sad}
- "Wait," said {a_kind} {animal}. "A {thing} needs [sun, rain, and time|time to wake up]."
  {kin} [smiled|laughed]. "You did not grow in one day, and a {thing} can't do it either."
- So {hero} waited. The rain fell, and the sun [shone|was warm]. {He} sang to the seed.
  {hero} gave it water each day and [pulled the weeds|told it stories]. It was hard to wait.
- Then something green came up! "Hello, little {thing}!" {he} said. {joy}
  Then it grew and grew. At last there it was, the [finest|nicest] {thing} in the garden.
- {hero} gave the {look} {thing} to {kin} with a [hug|kiss] and got a [hug|kiss] back.
  {hero} was happy, because the {look} {thing} was worth [the wait|every day of waiting].
  {hero} showed the {thing} to {friend}, and {friend} wanted to plant a seed [too|that day].
"""),
    "bake": ({"cake": "honey", "pie": "apples", "soup": "beans"}, """
- {One_day}, {hero} and {kin} made {a_thing} with {detail}.
  {hero} helped {kin} make {a_thing}, and {he} put in the {detail}.
- Knock, knock! It was {friend}. "I smell {thing}," said {friend}, "and I am so hungry."
  {friend} came to the door, [cold|tired] and hungry. "Oh! Is that {thing}?" asked {friend}.
- Then {a_kind} {animal} came to the window. "I like {thing} too," said the {animal}.
  "But it is my {thing}," thought {hero}. "I want to eat it [all|by myself]."
- Then {hero} saw {friend}'s [hungry|sad] eyes. "Come in," {he} said. "There is [enough|plenty]."
  But eating alone is no fun. "Come and sit with us," said {hero} with a smile.
- So they all sat down. {friend} told a [joke|story], and [everyone|they all] laughed.
  They ate and sang. "This is the best {thing} [ever|in the world]!" said {friend}.
- {hero} had only a little {thing}, but it was the [sweetest|best] {he} had ever had.
  Soon the {thing} was all gone, but {hero} was full of [joy|love].
  After that, {hero} and {friend} made {thing} together [every week|on every cold day].
"""),
    "rescue": (plain("kitten lamb duck"), """
- {One_day}, {hero} heard a [soft|sad] cry and saw {a_thing} {trap}.
  {hero} was on the way home when {he} saw {a_thing} {trap}.
- "Oh, you poor {thing}!" said {hero}. The {thing} was [wet and cold|hungry|afraid].
  The {thing} could not get out. It [shook with fear|gave a sad little cry].
- {hero} reached out {his} hand, but {his} arm was too short. {sad}
  "Wait here, little {thing}," {he} said, and {he} ran [home|fast] to get help.
- {kin} came with a [rope|basket|long board]. Slowly, slowly, they got the {thing} out.
  {friend} came to help. They worked [together|side by side]. Soon the {thing} was [free|safe].
- {hero} held it in {his} arms. "You are safe now, little {thing}," {he} [said|sang].
  At home, {hero} gave the {thing} [some|good] food and a [soft|dry] place to sleep.
- From that day on, the {look} {thing} [followed|walked beside] {hero} everywhere.
  That night, {hero} and the {thing} slept [side by side|nose to nose] by the fire.
"""),
    "honest": (plain("purse key book hat clock bell scarf"), """
- {One_day}, {hero} found {a_thing} {spot}.
  {hero} was walking [home|to school] when {he} saw {a_thing} {spot}.
- "What a [nice|lovely] {thing}!" {he} said. "I wish I could keep it."
  {He} picked it up. {hero} had always wanted a {thing} like that.
- But then {he} thought, "Somebody must miss this {thing}." So {he} went to find out.
  "Finders keepers," said {friend}. But {hero} shook {his} head. "It is not mine."
- {hero} asked {friend}. {He} asked {kin}. It was not their {thing}.
  {hero} went from [door to door|house to house]. "Did you lose a {thing}?" {he} asked.
- Then {he} saw {owner} with a sad face. "Is this your {thing}?" asked {hero}.
  At last {he} met {owner} who was looking in the grass. {hero} held out the {thing}.
- "Oh, my {thing}! You are [an honest|a good] {child}. Please have some {treat}."
  "Oh, thank you! I thought it was [lost|gone] for good! You are very kind."
- {hero} did not have the {thing} now, but {his} heart was [light|full] all the way home.
  {hero} was glad that the {look} {thing} was back [home|where it belonged].
"""),
    "stuck": (plain("kite ball hat scarf"), """
- {own}
- {One_day}, the wind [took|caught] the {thing}, and it got stuck {high}.
  {One_day}, the {thing} flew up, up, up, and it got stuck {high}.
- {hero} jumped and jumped, but {he} could not reach it. {sad}
  "Come down, {thing}!" [called|shouted] {hero}. But the {thing} [did not move|stayed up there].
  Even when {hero} stood on {friend}'s back, they were too [short|small].
  {kin} brought a [ladder|broom], but it was too short. "What can we do?" asked {hero}.
- Then {a_kind} {climber} came by. "Can you get my {thing}, please?" asked {hero}.
  "I can help," said a voice. It was {a_kind} {climber}. "I will get the {thing} for you."
- Up went the {climber}, [quick|fast] as the wind. Down came the {thing}! {joy}
  The {climber} gave the {thing} a little [push|pull]. Plop! It fell into {his} arms.
- {hero} [thanked|waved to] the {climber} and held the {look} {thing} tight all the way home.
  Now, when {hero} goes out with the {thing}, the {climber} comes along [too|to play].
  {hero} gave the {climber} some {treat} and never let go of the {thing} [again|on a windy day].
"""),
    "shop": (plain("drum doll kite train book hat bell flute robot sled ball"), """
- {One_day}, {hero} saw {a_thing} in a shop, but it cost ten coins, and {he} had [none|only one].
  There was {a_thing} in the shop, and {hero} wanted it [very much|so badly].
- So {hero} {job} for {kin}. Then {he} helped {friend}, too. Clink, clink went the coins.
  "I can work," said {hero}. {He} {job} for {kin} and got [one coin|two coins].
- Then, one day, the window was empty. The {thing} was gone! {sad}
  When {he} had ten coins, {he} ran to the shop. But where was the {thing}? {sad}
- "Don't be sad," said {owner} in the shop. "I kept the {thing} [safe|just] for you."
  Then {owner} came out with a smile. "I hid the {thing} for you. You worked so hard!"
- {hero} put {his} coins on the table, one by one. {joy}
  "Here are my ten coins," said {hero}. "I [earned|saved] them all by myself!"
- {hero} {used} the {look} {thing} all day, and it was [sweeter|better] because {he} had earned it.
  {hero} took the {thing} home and [showed it to|shared it with] {friend}.
"""),
    "give": (plain("scarf hat coat blanket"), """
- {own}
- One cold day, {he} saw {a_kind} {animal} in the snow. It was shaking [all over|with cold].
  It was winter. On the way home, {hero} met {a_kind} {animal} with [no home|cold feet].
- "I am so cold," said the {animal}. "The wind blew my [house|bed] away."
  "Why are you so sad?" asked {hero}. "I have no {thing} like yours," said the {animal}.
- {hero} loved the {thing}, but {he} said, "Here, you need it more than I do."
  {hero} [took a deep breath|smiled]. "Take my {thing}," {he} said. "It will keep you warm."
- The {animal} [curled up|lay down] in the {thing} and [stopped shaking|closed its eyes].
  "It is as warm as the sun!" said the {animal}, and [danced|jumped] in the snow.
- The {animal} kept the {thing}, and {hero} had a new friend [for life|that winter].
  {hero} did not miss the {look} {thing}, for a kind heart [is warmer still|keeps you warm too].
"""),
    "truth": (plain("pot clock lamp bell"), """
- {kin} had {a_thing}, and {hero} was not [allowed to|supposed to] play with it.
  There was {a_thing} on the table, and {hero} wanted to touch it.
- {One_day}, {he} threw a pillow. Crash! The {thing} fell and broke in two.
  {He} picked it up, just [once|to look]. It slipped! Now the {thing} was broken.
- {hero} hid the {thing} [under the bed|in the shed], but all day {his} [tummy|heart] hurt.
  "Did you see my {thing}?" asked {kin}. "No," said {hero}, but {his} [face|nose] got hot.
  {hero} was afraid. "Tell the truth," said {friend}. "It [helps|will make you feel better]."
- "I broke your {thing}," said {hero} to {kin}. "I am very sorry."
  {hero} went to {kin} with the {thing}. "It was me," {he} said [softly|with tears].
- "Thank you for telling me," said {kin}. "That was [brave|very brave]."
  "I am sad about the {thing}," said {kin}, "but I am [proud|glad] you told me."
- Then {hero} and {kin} mended the {look} {thing} with glue and a [big|warm] hug.
  {hero} helped {kin} fix the {thing}, and {his} heart felt light [again|as air].
"""),
    "trade": (plain("stone bell drum mask crown"), """
- {friend} had {a_thing}, and {hero} wanted one just like it.
  {One_day}, {hero} saw that {friend} had {a_thing}.
- "Will you trade?" asked {hero}. "I will give you [two|three|ten] {treat} for the {thing}."
  "I like your {thing}," said {hero}. "Can I have it for some {treat}?"
- "No, thank you," said {friend}. "I [like|love] my {thing} more than {treat}."
  {friend} thought about it. "No. A {thing} is not like {treat}. It lasts longer."
- Just then, {friend} [slipped|tripped] and fell down. {hero} forgot all about the {thing}.
  Then it began to rain, and {friend} had to carry [a lot of wood|a big bag] home.
- "Let me help you," said {hero}, and {he} [took {friend}'s hand|helped {friend} home].
  So {he} ran to help [at once|right away], and {he} did not ask for anything.
- "You are kind," said {friend}. "Here, you can have the {thing}. It is a gift."
  {friend} smiled. "I will not trade my {thing}, but I will share it with you."
- {hero} looked at the {look} {thing} and knew that a friend is the best [gift|thing] of all.
  {hero} took the {thing} in both hands and gave {friend} [a big hug|all the {treat}].
"""),
}


def parse_beats(text: str) -> list[list[str]]:
    """Returns the beats of a plot, each as the list of ways to tell it."""
    return [beat.split("\n  ") for beat in text.strip().removeprefix("- ").split("\n- ")]


BEATS = {plot: parse_beats(text) for plot, (_, text) in PLOTS.items()}


def with_article(phrase: str) -> str:
    """Returns the phrase after its indefinite article."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def expand(text: str, words: dict[str, str], rng: random.Random) -> str:
    """Returns the text with every choice made and every word filled in, words within words
    included."""
    while "{" in text or "[" in text:
        text = re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), text)
        text = text.format_map(words)
    return text


def tell_story(rng: random.Random) -> str:
    """Returns one story of 60 to 120 words, about one hero and one object."""
    plot = rng.choice(list(PLOTS))
    details = PLOTS[plot][0]
    words = {symbol: rng.choice(options) for symbol, options in SYMBOLS.items()}
    girl = rng.random() < 0.5
    words |= {"hero": rng.choice(GIRLS), **SHE} if girl else {"hero": rng.choice(BOYS), **HE}
    thing = rng.choice(list(details))
    use, used, looks = THINGS[thing]
    look = rng.choice(looks.split("|"))
    words |= {"thing": thing, "use": use, "used": used, "look": look, "detail": details[thing]}
    words |= {"a_thing": with_article(f"{look} {thing}"), "a_kind": with_article(words["kind"])}
    words |= {symbol.capitalize(): word[:1].upper() + word[1:] for symbol, word in words.items()}
    # Naming both in the same place of every story is what a small model learns to keep them by.
    opening = f"This is the story of {words['hero']} and the {thing}."
    return " ".join([opening, *(expand(rng.choice(ways), words, rng) for ways in BEATS[plot])])


def sample_stories(num_stories: int, seed: int = 0) -> Iterator[str]:
    """Yields stories: story i depends on the seed and i alone, so that any range can be told on its
    own."""
    for i in range(num_stories):
        yield tell_story(random.Random(f"{seed}/{i}"))


def keeps_hero_and_object(story: str) -> bool:
    """Tells whether the hero and the object of the opening are still those of the last sentence.

    The hero is named in the first sentence and the object in the first two. No other hero or
    object may turn up anywhere, and the story has to end where a sentence ends.
    """
    story = story.strip()
    sentences = re.split(r'(?<=[.!?])"?\s+', story)
    if len(sentences) < 3 or not re.search(r'[.!?]"?$', story):
        return False
    first, second, last = (
        set(re.findall(r"\w+", text)) for text in (sentences[0], sentences[1], sentences[-1])
    )
    named = set(re.findall(r"\w+", story))
    heroes, things = named & HEROES, named & THINGS.keys()
    if len(heroes) != 1 or len(things) != 1:
        return False
    return heroes <= first & last and things <= (first | second) & last
