"""Words and phrases that are manner and not content: hedges, refusals, first person, praise; in English and Chinese.

Single English words are looked up among the words of a text, phrases and Chinese are counted as strings. All English
is lower case, with straight apostrophes.
"""

HEDGE_WORDS = frozenset(
    "approximately apparently arguably could likely may maybe might perhaps possibly potentially presumably "
    "probably roughly seem seemingly seems somewhat suggest suggesting suggests supposedly typically uncertain "
    "unclear unlikely usually generally appears".split()
)
HEDGE_PHRASES = (
    *("i think", "i believe", "i guess", "i suppose", "in my opinion", "it is possible", "it's possible"),
    *("kind of", "sort of", "not sure", "not certain", "to some extent", "as far as i can"),
)
HEDGE_CHINESE = (
    *("可能", "也许", "或许", "大概", "大约", "似乎", "好像", "看起来", "看上去", "应该是", "估计", "推测", "不确定"),
    *("不太清楚", "我认为", "我觉得", "一般来说", "通常"),
)

REFUSAL_PHRASES = (
    *("i can't", "i cannot", "i can not", "i'm unable", "i am unable", "i'm not able", "i am not able"),
    *("i won't", "i will not", "i must decline", "i'm sorry", "i am sorry", "my apologies", "i apologize"),
    *("i apologise", "as an ai", "as a language model", "unfortunately", "not possible for me"),
)
REFUSAL_CHINESE = (
    *("抱歉", "对不起", "很遗憾", "无法", "我不能", "我不可以", "恕我", "作为一个人工智能", "作为人工智能"),
    *("作为一个语言模型", "作为语言模型"),
)

FIRST_PERSON_WORDS = frozenset(
    "i me my mine myself we us our ours ourselves i'm i've i'd i'll we're we've we'd we'll".split()
)
FIRST_PERSON_CHINESE = ("我", "咱们", "本人")

# Where an answer begins: agreement and praise before anything is said.
OPENERS = (
    *("absolutely", "certainly", "definitely", "great question", "good question", "excellent question", "of course"),
    *("sure", "thank you", "thanks", "what a ", "wonderful", "yes, of course", "i'd be happy", "i'd love", "happy to"),
    *("当然", "好的", "没问题", "很好的问题", "好问题", "这是一个很好", "这是个很好", "感谢", "谢谢", "非常好"),
)
ENTHUSIASM_WORDS = frozenset(
    "amazing awesome brilliant delightful excellent exciting fantastic fascinating glad "
    "great happy incredible incredibly lovely magnificent perfect perfectly remarkable stunning superb thrilled "
    "wonderful wonderfully".split()
)
ENTHUSIASM_CHINESE = ("太棒", "精彩", "美妙", "非常棒", "出色", "惊艳", "令人惊叹", "很高兴", "绝佳", "完美")
