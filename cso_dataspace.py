"""List and fetch Sentinel products of the Copernicus Data Space: one file, standard library only.

    settings file -> inquiry -> table -> downloaded, checked files

As a program:

    python -m cso_dataspace run      my.rc           inquire, write the table, download
    python -m cso_dataspace inquire  my.rc           the table only
    python -m cso_dataspace download table.csv       the files of a table
    python -m cso_dataspace check    my.rc           is everything in place, if not what to do

As a library:

    import cso_dataspace as cso
    settings = cso.read_settings("my.rc")
    rows = cso.inquire(settings, "cso.s5p.no2")          # list of Row, the table is written
    with cso.Session() as session:
        for outcome in cso.download(cso.tasks_of(rows, "data/%Y/%m"), session):
            print(outcome.state, outcome.filename)

A table is complete, or there is an error.  A file is complete and checked, or absent.  The access
token goes to the Data Space only.

Words: a *product* is one entry of the catalogue; its *footprint* the GeoJSON geometry of what it
covers; a *box* is west, south, east, north in degrees; a *href* the url of its bytes; a *row* its
line in the *table*, the csv file; a *part* the file beside the target while bytes come in.

The names in `__all__` are promised, the rest may change.  Python 3.6 or newer.  MIT licence.
"""

import argparse
import ast
import base64
import collections
import configparser
import contextlib
import csv
import datetime
import difflib
import email.utils
import errno
import hashlib
import hmac
import http.client
import itertools
import json
import logging
import math
import netrc
import operator
import os
import queue
import random
import re
import shutil
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
import zipfile
from itertools import chain, groupby
from math import asin, atan2, ceil, cos, degrees, floor, isfinite, radians, sin, sqrt
from typing import NamedTuple

__version__ = "1.0"

__all__ = [
    "CSO_DataSpace_Downloader", "CSO_DataSpace_Inquire", "NullAuth", "RcFile", "UtopyaRc",
    "Box", "CatalogueError", "CheckError", "DataSpaceError", "FileError", "HttpError", "LoginError",
    "Outcome", "Product", "Query", "Retry", "Row", "Session", "Settings", "SettingsError",
    "TableError", "Task", "box_overlap", "download", "fetch", "inquire", "main", "read_settings",
    "read_table", "search", "split_geometry", "tasks_of", "write_settings", "write_table",
]

log = logging.getLogger("cso_dataspace")


################ Errors ################

# Every text reads: subject: what is wrong; what was expected or what to do.


class DataSpaceError(Exception):
    """Base of all errors that this module raises for what a user, a file or a service did.

    `temporary` tells whether trying again later may help, `fatal` whether a batch must end.
    """

    temporary = fatal = False


class SettingsError(DataSpaceError):
    """A settings file, a setting or a command line value is wrong; has `filename` and `lineno`."""

    def __init__(self, message, filename=None, lineno=None):
        place = ":".join(str(part) for part in (filename, lineno) if part)
        super().__init__("%s: %s" % (place, message) if place else message)
        self.filename, self.lineno = filename, lineno


class TableError(DataSpaceError):
    """A csv table can't be read or written; the text names file and line."""


class CatalogueError(DataSpaceError):
    """The catalogue's answer can't be taken as a complete list."""


class LoginError(DataSpaceError):
    """There are no credentials, or the service refused them.  Never tried again."""

    fatal = True


class FileError(DataSpaceError):
    """A file can't be written; `fatal` where the disk or quota is exhausted."""

    def __init__(self, message, fatal=False):
        super().__init__(message)
        self.fatal = fatal


class CheckError(DataSpaceError):
    """What arrived is not the file that the catalogue describes."""

    def __init__(self, message, temporary=True):
        super().__init__(message)
        self.temporary = temporary


class HttpError(DataSpaceError):
    """A request failed; has `url`, `status` (0: no answer) and `retry_after` (seconds or None)."""

    def __init__(self, message, url="", status=0, temporary=False, retry_after=None):
        super().__init__(message)
        self.url, self.status = url, status
        self.temporary, self.retry_after = temporary, retry_after


class Stopped(DataSpaceError):
    """The run was asked to stop."""

    fatal = True


# What reading JSON of any shape may raise.
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


################ Files ################


@contextlib.contextmanager
def replacing(path, mode=0o666):
    """Give a text file that is at path, whole, when the block ends without an error."""
    beside = part_name(path)
    try:
        with file_errors(path):
            descriptor = os.open(beside, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode)
            with open(descriptor, "w", encoding="utf-8", newline="") as out:
                yield out
            os.replace(beside, path)
    finally:
        discard(beside)


def owner_name():
    """Return host-pid of this process, for the names of files that only it writes."""
    return "%s-%d" % (re.sub(r"\W", "_", socket.gethostname())[:40], os.getpid())


def part_name(path):
    """Return a new name beside a path: containers may share a host name and a pid, so by chance."""
    return "%s.%s-%d.part" % (path, owner_name(), random.SystemRandom().getrandbits(40))


@contextlib.contextmanager
def file_errors(path):
    """Turn an OSError of the block into a FileError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        advice = "; free some space and run again, it goes on where it stopped" if full else ""
        raise FileError("%s: %s%s" % (path, error.strerror or error, advice), full) from error


def discard(path):
    with contextlib.suppress(OSError):
        os.unlink(path)


def make_directories(path, dmode=None):
    """Make a directory and those above it, each new one with mode dmode whatever the umask."""
    if not path or os.path.isdir(path) or os.path.dirname(path) == path:
        return
    make_directories(os.path.dirname(path), dmode)
    with file_errors(path):
        try:
            os.mkdir(path)
            if dmode is not None:
                os.chmod(path, dmode)
        except FileExistsError:
            if not os.path.isdir(path):         # else another process made it just now
                raise


def directory_mode(dmode):
    """Return the mode meant by 0o775, 777, "777" or "0o775"; None for None or empty.

    A mode that shuts out the owner is never meant, so such a number is digits read as octal.
    Raises ValueError.
    """
    if dmode is None or dmode == "":
        return None
    try:
        mode = dmode if isinstance(dmode, int) and dmode & 0o700 == 0o700 else int(str(dmode), 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise ValueError("is no mode of a directory; expected octal digits such as 0o775")
    return mode


################ Expressions ################

# The conditions of #if and `selection`, the sums of $(( )) and typed values are Python expressions
# of which a small part is allowed: nothing here can import, call others, or grow without bound.

LARGEST = 10000         # characters of an expression or a text, items of a list, bits of a number


def parse_expression(text):
    """Return the tree of an expression for evaluate(); raise ValueError for what is not allowed."""
    check_size(len(text))
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError("no expression (%s)" % getattr(error, "msg", error)) from None
    others = {getattr(node, "attr", kind(node)) for node in ast.walk(tree)} - ALLOWED
    if others:
        raise ValueError("%s is not allowed in an expression" % ", ".join(sorted(others)))
    return tree


def evaluate(tree, names={}):
    """Return the value of a parsed expression; `names` are the variables it may use.

    Raises ValueError for anything that goes wrong.
    """
    def value(node):
        if isinstance(node, ast.Name):
            return known(node.id, names)
        result = known(kind(node), RULES)(node, value)
        check_size(result.bit_length() if isinstance(result, int) else
                   len(result) if hasattr(result, "__len__") else 0)
        return result

    try:
        return value(tree)
    except (TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def check_size(size):
    if size > LARGEST:
        raise ValueError("more than %d characters, items or bits" % LARGEST)


def kind(node):
    return type(node).__name__


def known(name, names):
    if name not in names:
        raise ValueError("%s is not known%s; texts need quotes" % (name, near(name, names)))
    return names[name]


def near(name, names):
    """Return a phrase that names the likes of a misspelt name; empty where there are none."""
    short = [other for other in map(str, names) if len(other) < 100]
    found = difflib.get_close_matches(name[:100], short[:5000], 2)
    return " (near: %s)" % ", ".join(found) if found else ""


def logical(node, value):
    """Return the first operand of `and`, `or` that decides, without a look at those after it."""
    for operand in node.values:
        found = value(operand)
        if bool(found) is isinstance(node.op, ast.Or):
            break
    return found


def compared(node, value):
    """Return whether all of a chain such as 1 < x <= 9 hold."""
    sides = [value(side) for side in [node.left] + node.comparators]
    return all(OPERATORS[kind(operation)](left, right)
               for operation, left, right in zip(node.ops, sides, sides[1:]))


def called(node, value):
    """Return the value of a call; a method is a function of the text before its dot."""
    if isinstance(node.func, ast.Attribute):
        return METHODS[node.func.attr](*map(value, [node.func.value] + node.args))
    return known(getattr(node.func, "id", kind(node.func)), FUNCTIONS)(*map(value, node.args))


def multiplied(left, right):
    """Return left * right; of texts too, but not of lists, which could hold each other."""
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str):
            check_size(len(text) * count)
        elif hasattr(text, "__len__"):
            raise TypeError("a list can't be multiplied")
    return left * right


def power(base, exponent):
    if isinstance(base, int) and isinstance(exponent, int):
        check_size(base.bit_length() * exponent)
    return base ** exponent


def rounded(number, digits=None):
    check_size(abs(digits or 0))
    return round(number, digits)


def replaced(text, old, new, *count):
    check_size(text.count(old) * len(new))
    return text.replace(old, new, *count)


OPERATORS: dict = {
    "Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le,
    "Gt": operator.gt, "GtE": operator.ge, "Is": operator.is_, "IsNot": operator.is_not,
    "In": lambda left, right: left in right, "NotIn": lambda left, right: left not in right,
    "Add": operator.add, "Sub": operator.sub, "Mult": multiplied, "Div": operator.truediv,
    "FloorDiv": operator.floordiv, "Pow": power,
    "Mod": lambda left, right: divmod(left, right)[1],      # % of a text would format it
    "Not": operator.not_, "UAdd": operator.pos, "USub": operator.neg}
FUNCTIONS = {"int": int, "float": float, "str": str, "bool": bool, "len": len, "min": min,
             "max": max, "abs": abs, "round": rounded, "sum": lambda numbers: sum(numbers)}
METHODS = {"startswith": str.startswith, "endswith": str.endswith, "lower": str.lower,
           "upper": str.upper, "strip": str.strip, "split": str.split, "replace": replaced}
RULES = {       # by the kind of a node, what it gives; value() gives what its parts do
    "BoolOp": logical, "Compare": compared, "Call": called,
    "BinOp": lambda node, value: OPERATORS[kind(node.op)](value(node.left), value(node.right)),
    "UnaryOp": lambda node, value: OPERATORS[kind(node.op)](value(node.operand)),
    "IfExp": lambda node, value: value(node.body if value(node.test) else node.orelse),
    "Subscript": lambda node, value: value(node.value)[value(node.slice)],
    "Index": lambda node, value: value(node.value),         # before Python 3.9
    "Slice": lambda node, value: slice(*(at and value(at) for _, at in ast.iter_fields(node))),
    "List": lambda node, value: list(map(value, node.elts)),
    "Tuple": lambda node, value: tuple(map(value, node.elts)),
    "Set": lambda node, value: set(map(value, node.elts)),
    "Dict": lambda node, value: dict(zip(map(value, node.keys), map(value, node.values)))}
RULES.update(dict.fromkeys("Constant Num Str NameConstant".split(),     # before 3.8 the last three
                           lambda node, value: ast.literal_eval(node)))
ALLOWED = {"Name", "Load", "And", "Or"}.union(RULES, OPERATORS, METHODS)


################ Typed values ################

BOOLEANS = {"T": True, "True": True, "yes": True, "1": True,
            "F": False, "False": False, "no": False, "0": False}
LITERALS = {"int": int, "float": float, "list": list, "tuple": tuple, "dict": dict, "set": set}
FAULTS = {"bool": "is no bool; expected one of " + " ".join(BOOLEANS),
          "datetime": "is no time; expected yyyy-mm-dd HH:MM:SS (UTC), such as 2018-07-01 00:00"}


def converted(text, totype):
    """Return the text of a value as type "str", "bool", "int", "datetime" etc.; raise ValueError.

    Numbers and lists may be expressions, `0o775` or `2*3`; an empty one is 0 or empty.  A time is
    UTC: 2018-07-01, 2018-07-01 00:00 or 2018-07-01T00:00:00Z.
    """
    if totype == "" and text in ("T", "F", "True", "False"):
        raise ValueError("looks like a bool; ask for it as 'bool' or 'str'")
    try:
        if totype in ("", "str"):
            return text
        if totype == "bool":
            return BOOLEANS[text]
        if totype == "datetime":
            words = re.sub(r"[-/:]|(?<=\d)T(?=\d)|Z$", " ", text.strip()).split()
            return datetime.datetime(*map(int, words))
        if totype in LITERALS:
            return LITERALS[totype](*[evaluate(parse_expression(text))] if text.strip() else [])
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(FAULTS.get(totype, "is no %s: %s" % (totype, error))) from None
    raise ValueError("can't be given as %r; expected str, bool, datetime, %s"
                     % (totype, ", ".join(LITERALS)))


################ Settings ################

# A file gives logical lines, an #if or #for takes those to its end with it; a line whose variables
# are not all known waits for them, so definitions may stand in any order.

VARIABLE = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
MOST_CHARACTERS = 3 * 10 ** 7   # of all that is read, and made by ${}, $(( )), #for and #include
LINE_COST, FILE_COST = 100, 5000        # characters that the shortest line and file count for
DEEPEST = 100                   # files that include each other
ENDS = {"#if": "#endif", "#for": "#endfor"}


class Settings:
    """The values of a settings file, held in a case-sensitive strict configparser store."""

    def __init__(self, filename):
        self.filename, self.places = filename, {}
        store = configparser.RawConfigParser(strict=True, delimiters=(":",))
        store.optionxform = str
        store.add_section("settings")
        self.section = store["settings"]

    def keys(self):
        """Return all keys, in the order of files and lines."""
        return sorted(self.places, key=self.places.get)

    def __contains__(self, key):
        return key in self.places

    def find(self, rcbase, name):
        """Return the first key that is there of those that a setting may have, or None."""
        return next((key for key in candidates(rcbase, name) if key in self), None)

    def place(self, key):
        """Return where a key is defined, as file:line; the file for a key that is not there."""
        return ":".join(str(part) for part in self.places.get(key, (self.filename,)) if part)

    def set(self, key, value, filename, lineno=0):
        """Give a key a value; the place is named in errors."""
        self.section[key], self.places[key] = value, (filename, lineno)

    def get(self, key, totype="", default=None):
        """Return a value as a type of converted(); raise SettingsError.

        `default`, if not None, is returned as it is for a key that is absent.
        """
        if key not in self and default is not None:
            return default
        if key not in self:
            raise SettingsError("key %r is not there%s" % (key, near(key, self.keys())),
                                self.filename)
        try:
            return converted(self.section[key], totype)
        except ValueError as error:
            raise SettingsError("%s: %.200r %s" % (key, self.section[key], error),
                                *self.places[key]) from None


class Line(NamedTuple):
    """A logical line, where it begins, and the files from the main one to this.

    An #if or #for has `branches`: lists of lines, the #if, #for, #elif or #else first.
    """

    text: str
    filename: str
    lineno: int
    files: tuple
    branches: tuple = ()

    @property
    def word(self):
        """The directive in column zero, such as "#if"; empty for an ordinary line."""
        return re.match(r"(#\w*)?", self.text).group()

    @property
    def rest(self):
        """What follows the directive; of an ordinary line all but its comment.

        A comment begins at the first "!" of the value, but "\\!" is a literal "!", and where there
        is one, nothing is cut.
        """
        if self.word:
            return self.text[len(self.word):].strip()
        key, colon, value = self.text.partition(":")
        value = value.replace("\\!", "!") if "\\!" in value else value.partition("!")[0]
        return key + colon + value

    def wrong(self, message):
        return SettingsError(message[:2000], self.filename, self.lineno)


def first_file(paths, line):
    """Return (path, bytes) of the first path that can be read."""
    tried = []
    for path in dict.fromkeys(map(os.path.normpath, paths)):
        try:
            with open(path, "rb") as source:
                return path, source.read(MOST_CHARACTERS + 1)
        except (OSError, ValueError) as error:
            tried.append("%s (%s)" % (os.path.abspath(path)[-500:],
                                      getattr(error, "strerror", None) or error))
    raise line.wrong("%s can't be read; tried %s" % (line.text or "settings", ", ".join(tried)))


def logical_lines(data, filename, files):
    """Yield the lines of a file, continuations joined by one blank, without comment lines."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    pieces = []
    for lineno, physical in enumerate(re.split("\r\n|\r|\n", text) + [""], 1):
        physical = physical.rstrip()
        pieces.append(physical.rstrip("\\").rstrip())
        if not physical.endswith("\\"):
            text = " ".join(pieces[:1] + [piece.lstrip() for piece in pieces[1:] if piece]).rstrip()
            line = Line(text, filename, lineno + 1 - len(pieces), files)
            if "\0" in text:
                raise line.wrong("a NUL byte; expected a text file in UTF-8")
            if text and not text.lstrip().startswith("!"):
                yield line
            pieces = []


def statement(line, lines):
    """Return the line; an #if or #for with its branches, taken from `lines` up to its end."""
    if line.word in ("", "#error", "#include", "#from"):
        return line
    if line.word not in ENDS:
        raise line.wrong("%r is out of place; expected #include, #from, #if, #for or #error "
                         "(a comment begins with !)" % line.text)
    branches, openers = [[line]], [line]
    for inner in lines:
        if inner.word in ENDS:
            openers.append(inner)
        elif inner.word in ENDS.values():
            opener = openers.pop()
            if inner.word != ENDS[opener.word]:
                raise inner.wrong("%s ends the %s of line %d; expected %s" % (
                    inner.word, opener.word, opener.lineno, ENDS[opener.word]))
            if not openers:
                return line._replace(branches=branches)
        elif line.word == "#if" and openers == [line] and inner.word in ("#elif", "#else"):
            branches.append([])
        branches[-1].append(inner)
    raise line.wrong("%s without an end; expected %s" % (line.word, ENDS[line.word]))


class Reader:
    """Reads a file with all it includes into `settings`; `origin` is the line that asks for it."""

    def __init__(self, path, origin, outside, cost=0):
        self.outside, self.cost, self.settings = outside, cost, Settings(path)
        self.known = collections.ChainMap(outside, self.settings.section)
        self.queue, self.waiting = collections.deque(), {}
        self.read([path], origin)
        self.work()
        self.known.maps.append({        # not before: keys of the files win
            "pid": os.getpid(), "hostname": socket.gethostname(), "pwd": os.getcwd(),
            "script": os.path.splitext(os.path.basename(sys.argv[0]))[0]})
        for name in self.known.maps[-1]:
            self.queue.extend(self.waiting.pop(name, ()))
        self.work()
        if self.waiting:
            raise self.undefined()

    def work(self):
        actions = {"": self.define, "#if": self.choose, "#for": self.repeat, "#error": self.fail,
                   "#include": self.include, "#from": self.take}
        while self.queue:
            line = self.queue.popleft()
            try:
                actions[line.word](line)
            except KeyError as unknown:         # of self.known: a variable that has no value yet
                self.waiting.setdefault(unknown.args[0], []).append(line)

    def counted(self, text, line, more=0):
        """Return what is read or made; raise SettingsError where all of it grows without bound."""
        self.cost += len(text) + more
        if self.cost > MOST_CHARACTERS:
            raise line.wrong("more than %d characters in all; expected less of ${}, #for and "
                             "#include" % MOST_CHARACTERS)
        return text

    def read(self, paths, line):
        """Queue the lines of the first file that can be read."""
        path, data = first_file(paths, line)
        files = line.files + (path,)
        if os.path.realpath(path) in map(os.path.realpath, line.files):
            raise line.wrong("a file includes itself: %s" % " -> ".join(files))
        if len(files) > DEEPEST:
            raise line.wrong("files include each other more than %d deep" % DEEPEST)
        self.counted(data, line, FILE_COST)
        self.push(list(logical_lines(data, path, files)), line)

    def push(self, lines, origin):
        """Queue lines before all others, blocks taken together."""
        self.counted("", origin, sum((LINE_COST + len(line.text) for line in lines), LINE_COST))
        rest = iter(lines)              # statement() takes the lines of a block from it as well
        self.queue.extendleft(reversed([statement(line, rest) for line in rest]))

    def filled(self, line):
        """Return what the line says with its variables filled in, in one pass; raise KeyError."""
        return VARIABLE.sub(lambda match: self.counted(str(self.known[match.group(1)]), line),
                            self.counted(line.rest, line))

    def calculated(self, text, line):
        """Return the text with each $(( EXPRESSION )) replaced by its value."""
        text, *pieces = text.split("$((")
        for piece in pieces:
            depths = itertools.accumulate((char == "(") - (char == ")") for char in piece)
            end = next((at for at, depth in enumerate(depths) if depth < 0), len(piece))
            if not piece.startswith("))", end):
                raise line.wrong("$(( without its )) in %r" % line.text)
            text += self.counted(str(self.evaluated(piece[:end], line)), line) + piece[end + 2:]
        return text

    def evaluated(self, text, line):
        try:
            return evaluate(parse_expression(text))
        except ValueError as error:
            raise line.wrong("%.200r: %s" % (text.strip(), error)) from None

    def define(self, line):
        key, colon, value = self.calculated(self.filled(line), line).partition(":")
        if not colon:
            raise line.wrong("no ':' in %r; expected 'key : value'" % line.text.strip())
        self.put(key.strip(), value.strip(), line)

    def put(self, key, value, line):
        if key in self.settings:
            raise line.wrong("key %.200r is defined twice, before at %s; expected one definition"
                             % (key, self.settings.place(key)))
        self.settings.set(key, value, line.filename, line.lineno)
        self.queue.extend(self.waiting.pop(key, ()))

    def choose(self, line):
        for header, *body in line.branches:
            if header.word == "#else" or self.evaluated(self.filled(header).rstrip(" :"), header):
                return self.push(body, header)

    def repeat(self, line):
        name, *words = self.filled(line).rstrip(" :").split() or [""]
        if words[:1] != ["in"]:
            raise line.wrong("%r; expected '#for NAME in WORD WORD ...'" % line.text)
        body = line.branches[0][1:]
        for word in reversed(words[1:]):
            self.counted(word, line, sum(inner.text.count(name) * len(word) for inner in body))
            self.push([inner._replace(text=inner.text.replace(name, word)) for inner in body], line)

    def fail(self, line):
        raise line.wrong(self.filled(line).replace("\\n", "\n").replace("\\t", "    "))

    def include(self, line):
        name = self.filled(line)
        beside, main = (os.path.join(os.path.dirname(of), name)
                        for of in (line.filename, line.files[0]))
        self.read([beside] if name.startswith("./") else [name, beside, main], line)

    def take(self, line):
        name, _, keys = self.filled(line).replace("\t", " ").partition(" import ")
        keys = keys.split()
        if not keys:
            raise line.wrong("%r; expected '#from FILE import KEY ...' or '... KEY as NAME'"
                             % line.text)
        path = os.path.join(os.path.dirname(line.filename), name.strip())
        other = Reader(path, line, self.outside, self.cost)
        self.cost, found = other.cost, other.settings
        for key, name in [keys[::2]] if keys[1:-1] == ["as"] else zip(keys, keys):
            if key not in found:
                raise line.wrong("no key %.200r in %s%s" % (key, path, near(key, found.keys())))
            self.put(name, found.get(key, "str"), line)

    def undefined(self):
        """Return the error for a variable that nobody defines, or else for one that needs itself.

        Directives go first: what others wait for may stand in their bodies.
        """
        pending = {line.text.partition(":")[0].strip() for line in chain(*self.waiting.values())}
        name = min(self.waiting, key=lambda name: (
            name in pending, not self.waiting[name][0].word))
        line = self.waiting[name][0]
        if name in pending:
            return line.wrong("${%s} needs itself; expected a value that does not" % name)
        return line.wrong("${%s} is not defined%s; expected a key of that name, or a variable of "
                          "the environment" % (name, near(name, self.known)))


def read_settings(filename, env={}, environ=os.environ):
    """Return the Settings of a file in the rc format; raise SettingsError with file and line.

    `env` are variables for ${NAME}, of any type; they go before those of the environment.
    """
    name = os.fsdecode(filename)
    return Reader(name, Line("", name, 0, ()), collections.ChainMap(env, environ)).settings


def write_settings(settings, filename):
    """Write the values as `key : value` lines that read back the same, beside and renamed.

    A character that would mean more than itself becomes an expression.
    """
    special = re.compile(r"^[#!]|\$(?=\{|\(\()|\\$|[\0\r\n\ud800-\udfff]")
    with replacing(os.fspath(filename)) as out:
        for key in settings.keys():
            line = "%s : %s" % (key, settings.get(key, "str").replace("!", "\\!"))
            out.write(special.sub(lambda match: "$(( %r ))" % match.group(), line) + "\n")


def candidates(rcbase, name):
    """Return the keys under which a setting is looked for, in order.

    >>> candidates("cso.no2", "area")
    ['cso.no2.area', '*.cso.no2.area', '*.no2.area', '*.area']
    """
    full = (rcbase + "." + name if rcbase else name).replace("..", ".").lstrip(".")
    parts = full.split(".")
    return [full] + ["*." + ".".join(parts[index:]) for index in range(len(parts))]


################ Names, times, boxes ################

# Columns of a Sentinel-5P file name (Sentinel-5P PRF file naming convention): fixed widths, so
# never split on "_", which product types contain.  AUX names have no orbit, collection, version.
S5P_NAME = re.compile(
    r"S5P_(?P<processing>.{4})_(?P<producttype>.{10})_(?P<start>\d{8}T\d{6})_(?P<end>\d{8}T\d{6})_"
    r"(?:(?P<orbit>\d{5})_(?P<collection>\d\d)_(?P<processor_version>\d{6})_)?"
    r"(?P<production>\d{8}T\d{6})(?:\.\w+)?$")

# The baseline in the names of Sentinel-2 (N0500), -3 (004.SEN3) and -6 (F08.SEN6).
BASELINE = re.compile(r"S2.*_N(?P<s2>\d{4})_R|S3.*_(?P<s3>\d{3})\.SEN3$|S6.*_(?P<s6>\w{3})\.SEN6$")

TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
                  r"(?:Z|([+-])(\d\d):?(\d\d))?$", re.I)
FROM_ISO = getattr(datetime.datetime, "fromisoformat", None)    # not in Python 3.6

# No separator, drive, control or half character, not only dots and blanks, no device of Windows.
PLAIN_NAME = re.compile(r"(?i)(?![. ]*\Z)(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|\Z))"
                        r"[^/\\:\x00-\x1f\x7f\ud800-\udfff]+\Z")

PLAIN_ID = re.compile(r"[A-Za-z0-9_.-]+\Z")
MD5 = re.compile(r"(?!0+\Z)[0-9a-fA-F]{32}\Z")
HREF_ID = re.compile(r"Products\(([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\)")


class Product(NamedTuple):
    """One entry of the catalogue, the same from every service.

    `start` and `end` are the measured period, UTC; `size` in bytes, 0 where unknown; `md5` is hex
    or empty; `orbit` and `processing` are the catalogue's, for names that do not tell them;
    `geometry` is GeoJSON or None.
    """

    product_id: str
    filename: str
    producttype: str
    start: datetime.datetime
    end: datetime.datetime
    orbit: str = ""
    processing: str = ""
    size: int = 0
    md5: str = ""
    published: str = ""
    geometry: object = None


class Box(NamedTuple):
    """An area in degrees; west > east crosses the antimeridian."""

    west: float
    south: float
    east: float
    north: float

    @classmethod
    def from_text(cls, text):
        """Return the box of "west,south,east,north", None for an empty text; raise ValueError."""
        if not text.strip():
            return None
        with contextlib.suppress(TypeError, ValueError):
            west, south, east, north = box = cls(*map(float, text.split(",")))
            if -90 <= south <= north <= 90 and all(
                    -360 <= lon <= 360 for lon in (west, east, east - west)):
                return box
        raise ValueError("is no area; expected west,south,east,north in degrees: south <= north "
                         "within -90 and 90, west and east within -360 and 360")


def parse_name(filename):
    """Return the table columns that a file name tells, as a dict; times are like 20180701T023416.

    >>> parse_name("S5P_OFFL_L2__NO2____20250311T115807_20250311T133937_38393_03_020800_"
    ...            "20250313T042301.nc")["orbit"]
    '38393'
    """
    match = S5P_NAME.match(filename)
    if match:
        return match.groupdict("")
    match = BASELINE.match(filename)
    return {"collection": match.group(match.lastgroup)} if match else {}


def safe_name(name):
    """Return the name if it is only a file name, else raise ValueError.

    Names come from tables and catalogues: none of them may lead out of the target folder.
    """
    if not PLAIN_NAME.match(name):
        raise ValueError("%r is not a plain file name" % name[:200])
    return name


def table_time(compact):
    """Return 20200101T023416 as 2020-01-01 02:34:16."""
    return "%s-%s-%s %s:%s:%s" % (compact[:4], compact[4:6], compact[6:8],
                                  compact[9:11], compact[11:13], compact[13:15])


def parse_time(text):
    """Return a service's time as a naive datetime in UTC, cut to microseconds; raise ValueError.

    Takes 0 to 9 digits of fraction, and "Z", "+00:00", another offset or nothing at the end.
    """
    if text[26:] == "Z" and text[20:26].isdigit() and FROM_ISO:     # the usual form, fast
        return FROM_ISO(text[:26])
    match = TIME.match(text)
    if not match:
        raise ValueError("%r is not a time" % (text,))
    *whole, fraction, sign, hours, minutes = match.groups("0")
    offset = datetime.timedelta(hours=int(hours), minutes=int(minutes))
    time_ = datetime.datetime(*map(int, whole), int(fraction[:6].ljust(6, "0")))
    return time_ + offset if sign == "-" else time_ - offset


def format_time(time_):
    """Return a datetime as the services take it, cut to milliseconds: 2018-07-01T00:00:00.000Z."""
    return time_.isoformat(timespec="milliseconds") + "Z"


def expand_time(template, time_):
    """Return the template with %Y %m %d %H %M %S %j %y filled in; other text stays as it is."""
    return re.sub(r"%[YmdHMSjy]", lambda match: time_.strftime(match.group()), template)


def mend_href(href):
    """Return a download url that today's service takes, whatever the age of the table.

    Quoted ids are refused by the service since 2024, and zipper was renamed to download.
    """
    href = re.sub(r"Products\((['\"])([^'\")]*)\1\)", r"Products(\2)", href.strip())
    href = re.sub(r"^http://(?=[\w.-]*\bdataspace\.copernicus\.eu/)", "https://", href)
    return re.sub(r"^https://zipper(?=\.dataspace\.copernicus\.eu/)", "https://download", href)


def href_id(href):
    """Return the product id in a url, or an empty text."""
    match = HREF_ID.search(href)
    return match.group(1) if match else ""


def is_directory_product(filename):
    return filename.endswith((".SAFE", ".SEN3", ".SEN6"))


################ Footprints ################
#
#   place   longitude and latitude in degrees
#   ring    the places of a polygon's outline as written, last = first; a line is an open ring
#   x, z    a place on the map: x is the longitude on an endless axis, z the sine of the latitude
#   walk    a ring laid on the map: its places, each the short way from the last
#   edge    two places, a step of a walk; a leg is a number of steps
#   turn    360 degrees of x; a walk that ends a turn from its start has gone round a pole
#   copy    the same thing whole turns further along the axis
#   seam    the meridian 180 and the poles, where catalogues cut what the sphere does not
#   share   area, as part of the sphere's
#
# A footprint is a closed curve on a sphere that somebody wrote down as flat numbers. Taken for a
# flat polygon it is wrong for five of six half orbits of S5P: they cross the antimeridian and hold
# one pole or both. Four ideas set it right, with no case for this pole or that:
#
# 1. Unwrap. On an endless axis a step of 359 degrees is one of -1, and no curve jumps. Only steps
#    of 360 degrees along a parallel, round the whole globe, are drawn on purpose and stay.
# 2. Close over the pole, by looking south. From a place look down the meridian and count the
#    edges you see: +1 if it runs east, which has you on its left, -1 if it runs west. That is the
#    winding number of the walk, closed over the north pole if it goes round one, and nothing need
#    be drawn. What is seen from is shaded: an edge shades all that lies north of it, and the sum
#    of the signed shades is the area. With z = sin(latitude) the map keeps areas true (Lambert's
#    cylinder; the sphere is 360 by 2), so that a shade is a plain trapezium.
# 3. Area modulo one. The south pole, or a ring written backwards, changes count and area by whole
#    spheres: a swath of 0.12 that holds both poles is drawn as 0.88, the rest of the globe. But
#    nobody images more than half the Earth, so the smaller side is meant. Turn the walk to have it
#    on its left, and a place is covered `base` + count times. Only maps may be larger.
# 4. Bend long edges. Between two corners of an image runs a great circle, which is no straight
#    line on a map. Edges along a parallel belong to maps and bands, and stay straight. Bending
#    keeps an edge within its longitudes, so for a box only the edges over it need be bent.
#
# The walks are cut along the sides of a box and its copies. It overlaps if an edge within them
# meets it. If none does it is wholly in or wholly out, as its centre is. The covered fraction is
# the shade that falls into it. The same cut, at -180 and 180, makes GeoJSON for other programs.
#
# Sources: Gauss's area formula and the winding number (any text on Green's theorem); Weiler and
# Atherton 1977 (walking along the frame to close a cut polygon); RFC 7946, sections 3.1.6 and
# 3.1.9 (GeoJSON rings, antimeridian and poles).

SAME = 1e-6      # degrees, 0.1 m: catalogues write six digits or more, so nearer numbers are one
SLACK = 1e-12    # degrees, 0.1 um: above the rounding of x + 360 (6e-14), below any digit written
BULGE = 0.01     # degrees, 1.1 km: a third of the width of the smallest pixel of S5P (3.5 km)
ROUNDING = 1e-6  # share: by which half a sphere, or a whole one, may seem too large
HALF = 0.5 + ROUNDING
LEG = 32         # edges that are looked at together first, for a half orbit has 300

PARTS = {  # coordinates as a list of parts, each a list of lines, or of a ring and its holes
    "Polygon": lambda coordinates: [coordinates],
    "MultiPolygon": lambda coordinates: coordinates,
    "LineString": lambda coordinates: [[coordinates]],
    "MultiLineString": lambda coordinates: [coordinates],
}

# Longitudes and latitudes as written, and their ranges.
Ring = collections.namedtuple("Ring", "lons lats west south east north")

# Walks, by part, with their inside to the left; `rest`: covered is the rest of what was drawn.
Footprint = collections.namedtuple("Footprint", "walks base share rest")


def box_overlap(geometry, box):
    """Return (overlaps, fraction) of a footprint and a box; never raise for a geometry.

    `geometry` is a GeoJSON dict; `box` is [west, south, east, north] in degrees, edges included,
    west > east crosses the antimeridian. `fraction` is the covered share of the box's area on the
    sphere; 1.0 or 0.0 for a box that is a point or a line; 0.0 for a footprint that is a line.
    What is missing or cannot be understood is unknown and counts as overlapping: (True, None).
    """
    west, south, east, north = box
    west, east = west - SLACK, east + (360 if east < west else 0) + SLACK
    try:
        parts = read_parts(geometry)
        if far_apart(parts, west, south, east, north):
            return False, 0.0
        box = west, sin(radians(south)), east, sin(radians(north))
        if is_line(geometry):
            return touches(edges_over(map(walk_of, chain(*parts)), *box), *box[1::2]), 0.0
        return overlap(footprint_of(parts), *box)
    except UNREADABLE:
        return True, None


def overlap(footprint, west, south, east, north):
    width, edges = east - west, edges_over(chain(*footprint.walks), west, south, east, north)
    if touches(filter(bounds, edges) if footprint.rest else edges, south, north):
        size = width * (north - south) if width > 3 * SLACK else 0  # it was grown by 2
        covered = footprint.base + shade(edges, south, north) / size if size else 1.0
    else:
        seen = sum(x1 - x0 for (x0, z0), (x1, _) in edges if z0 < (south + north) / 2)
        covered = footprint.base + round(seen / width)
        if not covered:
            return False, 0.0
    return True, min(1.0, abs(covered))  # rings that cross themselves count below 0 and above 1


# Reading: numbers as they are written.

def read_parts(geometry):
    """The Rings of a geometry, by part; raise one of UNREADABLE where it has no such thing."""
    parts = [[read_ring(points) for points in part]
             for part in PARTS[geometry["type"]](geometry["coordinates"])]
    if not parts or not all(parts):
        raise ValueError("no coordinates")
    return parts


def read_ring(points):
    lons, lats = list(zip(*points))[:2]  # further values, such as heights, are left out
    ring = Ring(lons, lats, min(lons), min(lats), max(lons), max(lats))
    numbers = isfinite(sum(lons) + sum(lats))  # one NaN or infinity spoils the sum
    if not numbers or ring.south < -90 or ring.north > 90 or ring[2:4] == ring[4:]:
        raise ValueError("not a number, no latitude, or one place only")
    return ring


def is_line(geometry):
    return geometry["type"].endswith("LineString")


def far_apart(parts, west, south, east, north):
    """True only where no ring can reach the box: the quick answer for most of a long list.

    Rings that span less than half a turn together have no step to unwrap and no pole inside, and
    cover less than half the sphere: their inside is what is drawn.
    """
    rings, south, north = list(chain(*parts)), sin(radians(south)), sin(radians(north))
    return (sum(ring.east - ring.west for ring in rings) < 180 and
            not any(meets(ring.west, ring.east, west, east) and
                    reaches(sin(radians(ring.south)), sin(radians(ring.north)),
                            ring.east - ring.west, south, north) for ring in rings))


def meets(low, high, west, east):
    """Does low..high on the endless axis meet west..east or a copy of it?"""
    return east + (high - west) // 360 * 360 >= low


def reaches(low, high, span, south, north):
    """May edges between the heights low and high that span so much reach to south..north?

    Along a great circle tan(latitude) is a cosine of the longitude (Napier), so the highest arch
    stands with both ends on `high`, and tan(top) is that of its ends over cos(span / 2). Sines
    grow less than tangents, so `high` over the same is never too low. Only false is certain.
    """
    arch = cos(radians(min(span, 180) / 2))
    return max(high, high / arch) >= south and min(low, low / arch) <= north


# Walking: unwrap, then bend.

def walk_of(ring):
    """A ring on the map, bent roughly: which side is the smaller one depends on no more.

    An edge that spans 5 degrees bulges by D / 8 = 1 % of its length at most. That can wait until
    a box needs it.
    """
    lons, lats, zs = ring.lons, ring.lats, list(map(sin, map(radians, ring.lats)))
    turned, walk = 0, [(lons[0], zs[0])]
    for lon0, lon1, lat0, lat1, z in zip(lons, lons[1:], lats, lats[1:], zs[1:]):
        step = abs(lon1 - lon0)
        if step >= 5:
            drawn = abs(step - 360) < SAME and abs(lat1 - lat0) < SAME  # round the globe, a band
            if step > 180 and not drawn:
                turned -= floor((lon1 - lon0 + 180) / 360) * 360
            if abs(lon1 + turned - walk[-1][0]) >= 5:
                walk += great_circle(walk[-1], (lon1 + turned, z), bulge=0.5)
        walk.append((lon1 + turned, z))  # not a sum of steps, to keep the digits that are written
    return walk


def great_circle(start, end, south=-1, north=1, bulge=BULGE):
    """The places between the ends of an edge that keep it to its great circle: its chord, cut up,
    seen from the centre. None if it passes by all that is between south and north.

    The middle of a great circle of length L that spans D of longitude is L D sin(lat) / 8 off a
    straight line of longitude and latitude: a sagitta, L / 8 times the angle by which it turns
    from the parallels, D sin(lat). A straight line of x and z is off by up to as much again, to
    the other side. In n pieces both are n^2 times less. Meridians are great circles as they are.
    """
    (x0, z0), (x1, z1) = start, end
    angle, radius0, radius1 = radians(x1 - x0), sqrt(1 - z0 * z0), sqrt(1 - z1 * z1)
    length2 = 2 - 2 * (z0 * z1 + radius0 * radius1 * cos(angle))  # of the chord, squared
    if (length2 * (x1 - x0)**2 < (4 * bulge)**2 or z0 == z1  # parallels belong to maps
            or not reaches(min(z0, z1), max(z0, z1), abs(x1 - x0), south, north)):
        return []
    pieces = ceil(sqrt(sqrt(length2) * abs(x1 - x0) / 4 / bulge))
    ahead, aside, up = radius1 * cos(angle) - radius0, radius1 * sin(angle), z1 - z0
    way = []
    for t in [i / pieces for i in range(1, pieces)]:
        a, b, c = radius0 + t * ahead, t * aside, z0 + t * up
        way.append((x0 + degrees(atan2(b, a)), c / sqrt(a * a + b * b + c * c)))
    return way


def edges_of(line):
    return zip(line, line[1:])


# Inside: every walk gets it on its left.

def footprint_of(parts):
    """The Footprint of the Rings of polygons."""
    walks, bases, shares, _ = zip(*map(inside_left, parts))
    footprint = Footprint(list(chain(*walks)), sum(bases), sum(shares), rest=False)
    as_drawn = footprint.share < HALF or any(map(is_grid, chain(*footprint.walks)))
    return footprint if as_drawn else rest_of(footprint)


def inside_left(part):
    """The Footprint of one ring and its holes.

    These are first as large as they are drawn, for the parts of a footprint may add up to the rest
    of the globe. Only if together they go round a pole is nothing drawn: the smaller side.
    """
    walks = [walk_of(closed(ring)) for ring in part]
    areas = list(map(area, walks))
    walks = [walk if (drawn >= 0) == (walk is walks[0]) else walk[::-1]
             for walk, drawn in zip(walks, areas)]
    share = abs(areas[0]) - sum(map(abs, areas[1:]))
    base = -int(share - ROUNDING)  # whole spheres too many, of orbits that pass a pole again
    footprint = Footprint([walks], base, share + base, rest=False)
    turn = sum(walk[-1][0] - walk[0][0] for walk in walks)
    return rest_of(footprint) if footprint.share > HALF and abs(turn) > 180 else footprint


def rest_of(footprint):
    walks = [[walk[::-1] for walk in part] for part in footprint.walks]
    return Footprint(walks, 1 - footprint.base, 1 - footprint.share, rest=True)


def closed(ring):
    if (ring.lons[0], ring.lats[0]) == (ring.lons[-1], ring.lats[-1]):
        return ring
    return ring._replace(lons=ring.lons + ring.lons[:1], lats=ring.lats + ring.lats[:1])


def is_grid(walk):
    """Does a walk follow meridians and parallels only, as maps and bands do?"""
    return all(x0 == x1 or z0 == z1 for (x0, z0), (x1, z1) in edges_of(walk))


def area(line):
    """Signed share of the sphere that a line shades."""
    return sum([(x1 - x0) * (2 - z0 - z1) for (x0, z0), (x1, z1) in edges_of(line)]) / 1440


# Edges and a box: meet it, see them from it, shade it.

def edges_over(walks, west, south, east, north):
    """The edges over the longitudes of a box: no others meet, see or shade it.

    They are bent where they may meet it, cut at its sides and moved to it from its copies.

    Of a long walk a leg that keeps off the box is taken for one edge from its start to its end:
    Beside the box no edge of either is over it. North of it none is in sight. South of it every
    edge shades all of the box that it is over, so that steps east and west cancel out and the
    leg shades what lies between its ends.
    """
    edges = []
    for walk in walks:
        for leg in [walk[i:i + LEG + 1] for i in range(0, len(walk) - 1, LEG)]:
            xs, zs = zip(*leg)
            if len(walk) > LEG and not (
                    meets(min(xs), max(xs), west, east) and
                    reaches(min(zs), max(zs), max(xs) - min(xs), south, north)):
                leg = leg[0], leg[-1]
            for start, end in edges_of(leg):
                if meets(min(start, end)[0], max(start, end)[0], west, east):
                    way = great_circle(start, end, south, north)
                    for edge in edges_of([start] + way + [end]) if way else [(start, end)]:
                        edges += cut_out(*edge, west, east)
    return edges


def cut_out(start, end, west, east):
    """What an edge has between west and east or their copies, moved there, in its order.

    An edge that runs along one of these sides has nothing between them.
    """
    (x0, z0), (x1, z1) = start, end
    low, high = (x0, x1) if x0 < x1 else (x1, x0)
    x = 360 * floor((low - west) / 360)
    if west < low - x and high - x < east:  # as most are
        return [((x0 - x, z0), (x1 - x, z1))]
    slope, pieces = (z1 - z0) / (x1 - x0) if low < high else 0.0, []
    for x in range(360 * floor((low - east) / 360) + 360, ceil((high - west) / 360) * 360, 360):
        a, b = clamp(x0, west + x, east + x), clamp(x1, west + x, east + x)
        pieces.append(((a - x, z0 + (a - x0) * slope), (b - x, z1 + (b - x1) * slope)))
    return pieces if x0 < x1 else pieces[::-1]


def clamp(number, low, high):
    return low if number < low else high if number > high else number


def bounds(edge):
    """Does an edge bound the rest of what was drawn? Those along a seam do not."""
    (x0, z0), (x1, z1) = edge
    return abs(z0 + z1) < 2 and not (x0 == x1 and x0 % 360 == 180)


def touches(edges, south, north):
    """Has an edge over a box a place in it?"""
    return any(min(z0, z1) <= north and max(z0, z1) >= south for (_, z0), (_, z1) in edges)


def shade(edges, south, north):
    """Signed area of a box that the edges over it shade."""
    return sum((x1 - x0) * (north - mean_clamped(z0, z1, south, north))
               for (x0, z0), (x1, z1) in edges)


def mean_clamped(a, b, low, high):
    """Mean over the numbers from a to b of each clamped to low..high."""
    inner_a, inner_b = clamp(a, low, high), clamp(b, low, high)
    if inner_a == inner_b:
        return inner_a
    outer = (inner_a - a) * inner_a + (b - inner_b) * inner_b
    return (outer + (inner_b - inner_a) * (inner_a + inner_b) / 2) / (b - a)


# Cutting at the seam, for files that other programs read.

FRAME = [(180, -1), (180, 1), (-180, 1), (-180, -1), (180, -1)]  # the map of the whole sphere
CORNERS = list(zip((0, 2, 3, 5, 6, 8, 9, 11), FRAME[:4] * 2))  # by way_round, twice round
NOTHING = 1e-12  # share: 500 m2, a sliver left by rounding


def split_geometry(geometry):
    """Return what a footprint covers as GeoJSON by RFC 7946, whatever was drawn; None if unknown.

    Longitudes in -180..180, nothing crosses 180, poles inside are walked to; rings are closed,
    exteriors counterclockwise, holes clockwise; long edges are bent; two values a place.
    """
    try:
        parts = read_parts(geometry)
        if is_line(geometry):
            lines = chain.from_iterable(cut(walk_of(ring)) for ring in chain(*parts))
            kind, members = "LineString", list(map(places, lines))
        else:
            kind, members = "Polygon", [list(map(places, polygon))
                                        for polygon in polygons_of(footprint_of(parts))]
    except UNREADABLE:
        return None
    if len(members) == 1:
        return {"type": kind, "coordinates": members[0]}
    return {"type": "Multi" + kind, "coordinates": members} if members else None


def places(line):
    """Longitudes and latitudes to 0.1 m, without the repetitions that this makes."""
    rounded = ([round(x, 6), round(degrees(asin(clamp(z, -1, 1))), 6)] for x, z in line)
    return [place for place, _ in groupby(rounded)]


def polygons_of(footprint):
    """Polygons on the map, each an exterior and its holes as lines of (x, z)."""
    found = []
    for walks in [list(chain(*footprint.walks))] if footprint.rest else footprint.walks:
        pieces = list(chain(*map(cut, walks)))
        whole = [piece for piece in pieces if piece[0] == piece[-1]]
        joined = joined_round_frame([piece for piece in pieces if piece[0] != piece[-1]])
        polygons = [[ring] for ring in whole + joined if area(ring) > NOTHING]
        polygons += [] if joined or not footprint.rest else [[FRAME]]
        for hole in whole:
            if area(hole) < -NOTHING:
                homes = (home for home in polygons if holds(home[0], *hole[0]))
                next(homes, []).append(hole)
        found += polygons
    return found


def holds(ring, x, z):
    return overlap(Footprint([[ring]], 0, 0.0, rest=False), x - SLACK, z, x + SLACK, z)[0]


def cut(walk):
    """The lines of a walk, bent, cut at the meridian 180 and moved to -180..180.

    What runs along 180 is left out: the frame puts that back.
    """
    lines = []
    for start, end in edges_over([walk], -180, -1, 180, 1):
        if not lines or lines[-1][-1] != start:
            lines.append([start])
        lines[-1].append(end)
    if len(lines) > 1:
        (x0, z0), (x1, z1) = lines[-1][-1], lines[0][0]
        if abs(x0 - x1) < SLACK and z0 == z1:  # cut only where the ring happens to begin
            lines[0] = lines.pop() + lines[0][1:]
    return lines


def joined_round_frame(pieces):
    """Rings of pieces, each led from its end round the frame to where the inside goes on.

    With the inside to the left the frame is followed counterclockwise, to the next start of a
    piece; on the way it passes over the poles that are inside.
    """
    rings = []
    while pieces:
        ring = pieces.pop()
        while ring[0] != ring[-1]:
            end = way_round(ring[-1])
            ahead = [(way_round(piece[0]) - end) % 6 for piece in pieces + [ring]]
            following = ahead.index(min(ahead))
            ring = ring + [corner for way, corner in CORNERS if end < way < end + min(ahead)]
            ring += pieces.pop(following) if following < len(pieces) else ring[:1]
        rings.append(ring)
    return rings


def way_round(place):
    """How far round the frame, counterclockwise from its lower right corner, a place on 180 is."""
    x, z = place
    return round(z + 1 if x > 0 else 4 - z, 12)


# Text: the Footprint of OData.

WKT = re.compile(r"\s*(?:geography')?(?:SRID=\d+;)?\s*([A-Z]+)[\sZM]*(\(.*\))'?\s*", re.I | re.S)
WKT_TYPES = {kind.upper(): kind for kind in PARTS}


def geometry_from_wkt(text):
    """Return the GeoJSON geometry of OData's "geography'SRID=4326;POLYGON ((lon lat, ...))'".

    The wrapper may be missing. Places keep two values. None for any other text, or no text.
    """
    if not text:        # as in every entry of a list that was asked for without footprints
        return None
    try:
        kind, nested = WKT.fullmatch(text).groups()
        nested = re.sub(r"([^\s(),]+)\s+([^\s(),]+)[^(),]*", r"[\1,\2]", nested)
        coordinates = json.loads(nested.replace("(", "[").replace(")", "]"))
        geometry = {"type": WKT_TYPES[kind.upper()], "coordinates": coordinates}
        read_parts(geometry)
    except UNREADABLE:
        return None
    return geometry


################ HTTP ################

DOMAIN = "dataspace.copernicus.eu"
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 6
CHUNK = 1 << 18                 # bytes per read: large enough for full speed, small for memory
CRAWL = 1000                    # bytes per second; slower for a whole timeout counts as a stall
LARGEST_PAGE = 1 << 28          # bytes of a catalogue's answer
LONGEST_MESSAGE = 4096          # bytes that are read of an error body
LONGEST_RETRY_AFTER = 7200      # seconds; a service that asks for more gets no further try

# Where Linux, BSD and macOS keep certificate authorities, for a Python built without a path.
CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem", "/usr/local/share/certs/ca-root-nss.crt")


class Request(NamedTuple):
    """A request to a catalogue; `place` is where in the list it goes on, as its adapter counts."""

    url: str
    body: object = None         # sent as JSON by POST; None: GET
    place: object = None


class Retry(NamedTuple):
    """How often a request is tried, and the seconds waited: nsec_wait, then twice as long each."""

    maxtry: int = 10
    nsec_wait: float = 5
    nsec_wait_max: float = 600

    def wait(self, tries, retry_after=None, jitter=random.random):
        """Return the seconds to wait after so many failed tries.

        Never less than the service asked for.  The jitter keeps a hundred jobs that failed
        together from coming back together.
        """
        seconds = self.nsec_wait * 2.0 ** min(tries - 1, 60) * (1 + 0.25 * (tries > 1) * jitter())
        return max(min(seconds, self.nsec_wait_max), (retry_after or 0) * (1 + 0.25 * jitter()))


def is_loopback(host):
    return bool(re.match(r"(localhost|::1|127(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3})\Z", host))


def split_url(url):
    """Return the parts of a url; those of a text that is no url are empty."""
    with contextlib.suppress(ValueError):
        return urllib.parse.urlsplit(url)
    return urllib.parse.urlsplit("")


def host_of(url):
    return (split_url(url).hostname or "").rstrip(".")


def may_see_token(url, trusted=()):
    """Return whether the access token may be sent to this url: the third promise, in one place."""
    host, parts = host_of(url), split_url(url)
    if not re.match(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]*)?\Z", parts.netloc):
        return False            # urls that are read in more than one way
    if is_loopback(host):
        return parts.scheme in ("http", "https")
    return parts.scheme == "https" and (is_data_space(host) or host in trusted)


def is_data_space(host):
    return host == DOMAIN or host.endswith("." + DOMAIN)


def shown(url):
    """Return the url for a message: no password, no query."""
    parts = split_url(url)
    if not parts.netloc:
        return repr(re.sub(".*@", "...@", url[:200]))
    return "%s://%s%s" % (parts.scheme, parts.netloc.rpartition("@")[2], parts.path)


def failure(url, text, status=0, temporary=True, wait=None):
    """Return the HttpError for a request to this url."""
    return HttpError("%s: %s" % (shown(url), text), url, status, temporary, wait)


def service_message(body):
    """Return what an error body says, in one line, from any of the forms that the services use.

    A page that repeats the request does not show the token or the password that was in it.
    """
    text = re.sub(r"(?i)(\bbearer |(?:password|token|totp)=)[^\s\"&<]+", r"\1...",
                  body[:LONGEST_MESSAGE].decode("utf-8", "replace"))
    try:
        said = words_of(json.loads(text))
    except UNREADABLE:
        said = re.sub(r"(?s)<(script|style|head).*?</\1>|<[^>]*>", " ", text)
    return " ".join(said.split())[:300]


def words_of(said):
    """Return the words in a decoded error body; nested forms are read inside out."""
    if isinstance(said, dict):
        return ": ".join(filter(None, (words_of(said.get(key)) for key in (
            "ErrorMessage", "error_description", "message", "description", "msg", "code", "loc",
            "ErrorDetail", "detail", "error"))))
    if isinstance(said, list):
        return "; ".join(map(words_of, said))
    return "" if said is None else str(said)


def retry_after(headers, now=time.time):
    """Return the seconds that a Retry-After header asks for, in either form, or None."""
    text = (headers.get("Retry-After") or "").strip()
    if re.match(r"[0-9]{1,15}\Z", text):
        return int(text)
    try:
        return max(0, email.utils.mktime_tz(email.utils.parsedate_tz(text)) - now())
    except UNREADABLE:
        return None


def ca_context():
    """Return a TLS context that verifies, with the system's authorities wherever they are."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()      # None for those that are not there
    if not (context.cert_store_stats()["x509_ca"] or paths.cafile
            or paths.capath and os.listdir(paths.capath)):
        bundles = [path for path in CA_BUNDLES if os.path.exists(path)]
        if not bundles:
            with contextlib.suppress(ImportError):
                import certifi
                bundles.append(certifi.where())
        for path in bundles[:1]:
            context.load_verify_locations(path)
    return context


class Connections(urllib.request.HTTPHandler):
    """Opens connections for urllib; the first one over TLS makes the context for all."""

    https_request = urllib.request.HTTPHandler.http_request
    context = None

    def https_open(self, request):
        self.context = self.context or ca_context()
        return self.do_open(http.client.HTTPSConnection, request, context=self.context)


class Proxies(urllib.request.ProxyHandler):
    """The proxies of the environment, but never for this machine: they would see the token."""

    def proxy_open(self, request, proxy, kind):
        if not is_loopback(host_of(request.full_url)):
            return super().proxy_open(request, proxy, kind)


class Http:
    """One request at a time: redirects followed by hand, every failure a HttpError.

    `timeout` is in seconds without a byte; `trusted` are further hosts that may see the token.
    Proxies come from HTTPS_PROXY, HTTP_PROXY and NO_PROXY, as urllib reads them.
    """

    def __init__(self, timeout=60, trusted=()):
        self.timeout, self.trusted = timeout, [host.lower() for host in trusted]
        # No OpenerDirector of build_opener: that one follows redirects with the token in the
        # headers, and opens file: and ftp: urls.
        self.opener = urllib.request.OpenerDirector()
        for handler in (Proxies(), urllib.request.UnknownHandler(), Connections()):
            self.opener.add_handler(handler)

    def send(self, url, headers, data):
        """Return the response of a single exchange, whatever its status."""
        headers = dict(headers, **{"User-Agent": "cso_dataspace/" + __version__})
        try:
            request = urllib.request.Request(url, data, headers)
            return self.opener.open(request, timeout=self.timeout)
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            raise connection_error(url, error) from None    # its text may hold a password

    def open(self, url, headers={}, data=None, token=None):
        """Return the open response of status 200 or 206; the caller closes it.

        The token goes along only where may_see_token allows, at every redirect anew.
        """
        for _ in range(MAX_REDIRECTS + 1):
            allowed = token and may_see_token(url, self.trusted)
            bearer = {"Authorization": "Bearer " + token} if allowed else {}
            response = self.send(url, dict(headers, **bearer), data)
            if response.status in (200, 206):
                return response
            target = split_url(response.headers.get("Location", "")).geturl()
            if response.status not in REDIRECTS or not target or data is not None:
                raise status_error(url, response)
            response.close()
            url = urllib.parse.urljoin(url, target)
        raise failure(url, "more than %d redirects lead here; the service is at fault, or the url "
                      "is wrong" % MAX_REDIRECTS, temporary=False)


def connection_error(url, error):
    """Return the HttpError for an exchange that brought no answer; no text of it is a secret."""
    reason, host = getattr(error, "reason", error), host_of(url)
    text = re.sub("(?s).*@", "...@", str(reason)) or type(error).__name__
    advice, temporary = "", False
    if "CERTIFICATE_VERIFY_FAILED" in text or isinstance(reason, ssl.CertificateError):
        advice = ("; the certificate of %s is not trusted here: where a proxy re-signs it, point "
                  "SSL_CERT_FILE to the authority's file" % host)
    elif isinstance(error, (ValueError, http.client.InvalidURL)) or re.match(
            "unknown url|no host", text):       # it may quote a part of a proxy's password
        text, advice = "can't be asked", "; http://HOST/... or https://HOST/... was expected"
    elif "Tunnel connection failed: 407" in text:
        advice = "; the proxy wants a password: HTTPS_PROXY=http://USER:PW@HOST"
    else:
        temporary = True
        if isinstance(reason, socket.timeout):
            text = "no answer in time"
        elif isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
            advice = "; is the name %r right, and this machine on the network?" % host
    proxy = " (by the proxy %s)" % proxy_of(url) if proxy_of(url) else ""
    return failure(url, text + proxy + advice, temporary=temporary)


def proxy_of(url):
    """Return the proxy that a request to this url takes, without its password, or an empty text."""
    proxy = urllib.request.getproxies().get(split_url(url).scheme)
    if not proxy or is_loopback(host_of(url)) or urllib.request.proxy_bypass(host_of(url)):
        return ""
    return "http://" + re.sub(r"(?s)^(\w+:/*)?(.*@)?", "", proxy)


def status_error(url, response):
    """Return the HttpError for an answer with a failure status, and close it."""
    status, wait, body = response.status, retry_after(response.headers), b""
    with response, contextlib.suppress(HttpError):
        for data in chunks(response, url, 5):       # the begin of what it says will do
            body += data
            if len(body) > LONGEST_MESSAGE:
                break
    said = service_message(body)
    if status in REDIRECTS:
        said = "redirected to " + shown(response.headers.get("Location") or "nowhere")
    temporary = status in (408, 429) or status >= 500
    if temporary and (wait or 0) > LONGEST_RETRY_AFTER:
        temporary, said = False, "%s; try again in %d s, it says" % (said, wait)
    text = "%d %s" % (status, http.client.responses.get(status, ""))
    return failure(url, ": ".join(filter(None, (text.strip(), said))), status, temporary, wait)


def body_length(response):
    """Return the bytes that the body must have, None where the service does not say."""
    length = response.headers.get("Content-Length", "")
    chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    return int(length) if re.match(r"[0-9]{1,18}\Z", length) and not chunked else None


def chunks(response, url, timeout, clock=time.monotonic, most=math.inf):
    """Yield the body as it comes.

    Raises a temporary HttpError when the connection stalls, crawls, breaks or ends early: read()
    with a size ends early without an error, so the bytes are counted here.  More than `most` bytes
    are an error as well.
    """
    expected, count = body_length(response), 0
    began, mark = clock(), 0
    while True:
        try:
            data = response.read1(CHUNK)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            raise failure(url, "connection lost after %d bytes: %s" % (
                count, str(error) or type(error).__name__)) from error
        if not data:
            break
        count += len(data)
        if count > most:
            raise failure(url, "more than %d bytes came" % most)
        yield data
        if clock() - began > timeout:
            if count - mark < CRAWL * timeout:
                raise failure(url, "under %d bytes a second for %g s" % (CRAWL, timeout))
            began, mark = clock(), count
    if expected is not None and count != expected:
        raise failure(url, "connection ended after %d of %d bytes" % (count, expected))


################ Credentials and token ################

TOKEN_URL = "https://identity.%s/auth/realms/CDSE/protocol/openid-connect/token" % DOMAIN
NETRC_HOSTS = tuple(name + DOMAIN for name in ("zipper.", "download.", "identity.", ""))
CLAIM_AGE = 60                  # seconds after which another process's login counts as dead


class Credentials(NamedTuple):
    """A user, a password, and where they were found."""

    username: str
    password: str
    source: str

    def __repr__(self):
        return "Credentials(%r, source=%r)" % (self.username, self.source)


def find_credentials(host, environ=os.environ):
    """Return the Credentials for a host: environment first, then the netrc file.

    Raises LoginError that names every place looked at, or the chmod for a netrc that others can
    read.
    """
    username, password = environ.get("CDSE_USERNAME"), environ.get("CDSE_PASSWORD")
    if username and password:
        return Credentials(username, password, "CDSE_USERNAME and CDSE_PASSWORD")
    if username or password:
        raise LoginError("credentials: only one of CDSE_USERNAME and CDSE_PASSWORD is set; "
                         "set both or none")
    path = netrc_path(environ)
    entries, hosts = read_netrc(path), list(dict.fromkeys(filter(None, (host,) + NETRC_HOSTS)))
    for name in filter(entries.get, hosts):
        username, _, password = entries[name]
        if not (username and password):
            raise LoginError("%s: machine %s has no login or no password" % (path, name))
        return Credentials(username, password, "%s, machine %s" % (path, name))
    raise LoginError(
        "credentials: none found; looked at CDSE_USERNAME and CDSE_PASSWORD in the environment, "
        "and %s for machine %s; put 'machine zipper.%s login USER password PASSWORD' there "
        "and chmod 400 it" % (path + " (no such file)" * (not os.path.exists(path)),
                              ", ".join(hosts), DOMAIN))


def netrc_path(environ):
    return os.path.expanduser(environ.get("NETRC") or os.path.join("~", ".netrc"))


def read_netrc(path):
    """Return (user, account, password) by host, none where there is no file; raise LoginError."""
    try:
        check_private(path)
        return netrc.netrc(path).hosts
    except FileNotFoundError:
        return {}
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        # the parser's own text may quote a token of the file: name the line only
        line = getattr(error, "lineno", None)
        raise LoginError("%s%s: can't be read as a netrc file; expected lines 'machine HOST login "
                         "USER password PASSWORD'" % (path, ":%d" % line if line else "")) from None


def check_private(path):
    """Raise LoginError for a secret file that others can read (POSIX modes; else no check)."""
    mode = os.stat(path).st_mode
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LoginError("%s: others can read it (mode %03o); type: chmod 400 %s"
                         % (path, stat.S_IMODE(mode), path))


def totp(secret, now):
    """Return the six digits of RFC 6238 (SHA-1, 30 s) for a base32 secret at a Unix time."""
    text = re.sub(r"[\s-]", "", secret).upper()
    try:
        key = base64.b32decode(text + "=" * (-len(text) % 8))
    except ValueError:
        raise LoginError("CDSE_TOTP_SECRET: not base32; expected letters A-Z and digits 2-7, as "
                         "the account page shows it") from None
    digest = hmac.new(key, int(now // 30).to_bytes(8, "big"), hashlib.sha1).digest()
    offset = digest[-1] & 15
    code = int.from_bytes(digest[offset:offset + 4], "big") & 0x7fffffff
    return "%06d" % (code % 10 ** 6)


class Grant(NamedTuple):
    """A token, one to renew it (or empty), and until when it is fresh on the clock of its holder.

    Renewed up to a minute early, so that no request starts with a token about to end.
    """

    access: str
    refresh: str
    until: float

    def __repr__(self):
        return "Grant(until=%r)" % self.until


def parse_grant(body, began):
    """Return the Grant in a token answer that was asked for at clock time `began`."""
    try:
        answer = json.loads(body.decode("utf-8"))
        access, refresh = answer["access_token"], answer.get("refresh_token")
        seconds = float(answer.get("expires_in", 600))
        if not (is_token(access) and seconds > 0):
            raise ValueError
    except UNREADABLE:
        raise HttpError("token service: the answer holds no token", temporary=True) from None
    until = began + seconds - min(60, seconds / 4)
    return Grant(access, refresh if is_token(refresh) else "", until)


def is_token(text):
    return isinstance(text, str) and re.match(r"[\x21-\x7e]+\Z", text) is not None


class TokenCache:
    """A file through which the processes of one account share a token (mode 0600, no file lock).

    It tells how long the token is fresh, and when that was written: in wall time, which processes
    on several machines share to some seconds.  A token from the future is not used, and a refusal
    renews it anyway.
    """

    def __init__(self, path, account, clock, now):
        self.path, self.account, self.clock, self.now = path, account, clock, now

    def read(self):
        """Return the shared Grant, or None."""
        try:
            check_private(self.path)
            with open(self.path, encoding="utf-8") as text:
                kept = json.load(text)
            age = self.now() - kept["written"]
            if kept["account"] == self.account and age > -30 and is_token(kept["access"]):
                return Grant(kept["access"], kept["refresh"], self.clock() + kept["left"] - age)
        except FileNotFoundError:
            pass
        except (OSError,) + UNREADABLE as error:
            log.warning("%s: no usable token in it (%s)", self.path, type(error).__name__)
        return None

    def write(self, grant):
        with replacing(self.path, 0o600) as out:
            json.dump({"account": self.account, "access": grant.access, "refresh": grant.refresh,
                       "left": grant.until - self.clock(), "written": self.now()}, out)

    @contextlib.contextmanager
    def claimed(self, sleep):
        """Hold the file that tells other processes to wait; one of a dead process is removed."""
        claim = self.path + ".login"
        with file_errors(claim):
            while True:
                with contextlib.suppress(FileExistsError):
                    open(claim, "x").close()
                    break
                sleep(0.2 + 0.2 * random.random())      # two that look at once remove two claims
                with contextlib.suppress(FileNotFoundError):
                    if abs(self.now() - os.stat(claim).st_mtime) > CLAIM_AGE:
                        os.unlink(claim)
        try:
            yield
        finally:
            discard(claim)


class Token:
    """Keeps one access token for all threads and renews it before it expires.

    `post(url, fields)` sends a form and returns the body.  Refresh token first, password after; a
    refused login is remembered and never tried again.
    """

    def __init__(self, post, url, environ, clock, sleep, now=time.time):
        self.post, self.url, self.environ = post, url, environ
        self.clock, self.now, self.sleep = clock, now, sleep
        self.lock = threading.Lock()
        self.credentials = self.cache = self.grant = self.refused = None
        self.doubted = False    # whether the service refused a token and has taken none since

    def get(self, host=""):
        """Return an access token, new where needed; raise LoginError or HttpError."""
        with self.lock:
            if self.refused:
                raise self.refused
            if self.credentials is None:
                self.prepare(host)
            if not self.fresh():
                self.renew()
            return self.grant.access

    def prepare(self, host):
        """Find who logs in; the first host that needs a token tells."""
        if not may_see_token(self.url, [host_of(self.url)]):
            raise LoginError("%s: the password must not go over http; an https token_url was "
                             "expected" % shown(self.url))
        self.credentials = find_credentials(host, self.environ)
        path = self.environ.get("CDSE_TOKEN_CACHE")
        if path:
            account = "%s %s" % (self.credentials.username, self.url)
            self.cache = TokenCache(path, account, self.clock, self.now)

    def fresh(self):
        return self.grant is not None and self.grant.until > self.clock()

    def reject(self, token, error):
        """Take note that the service refused this token; the next get() brings another.

        Two tokens refused with none taken in between are a refused login.
        """
        with self.lock:
            if not self.fresh() or token != self.grant.access:
                return          # another thread has rejected or renewed it already
            if self.doubted:
                self.refused = LoginError("token of %s: refused though it is new: %s" % (
                    self.credentials.username, error))
                raise self.refused from error
            self.doubted, self.grant = True, self.grant._replace(until=-math.inf)

    def renew(self):
        if self.cache is None:
            self.grant = self.ask()
        elif not self.take_shared():
            with self.cache.claimed(self.sleep):        # one process logs in, others wait here
                if not self.take_shared():
                    self.grant = self.ask()
                    self.cache.write(self.grant)

    def take_shared(self):
        """Take what another process left, unless it is what was refused here; is it fresh?"""
        shared = self.cache.read()
        if shared and not (self.grant and shared.access == self.grant.access):
            self.grant = shared         # if it is not fresh its refresh token may still serve
        return self.fresh()

    def ask(self):
        """Return a Grant of the service: by the refresh token where there is one, else anew."""
        if self.grant and self.grant.refresh:
            try:
                return self.request(grant_type="refresh_token", refresh_token=self.grant.refresh)
            except HttpError as error:
                if error.status not in (400, 401, 500):     # 500 was seen for one that has ended
                    raise
        return self.login()

    def login(self):
        user, password, source = self.credentials
        code, secret = self.environ.get("CDSE_TOTP"), self.environ.get("CDSE_TOTP_SECRET")
        fields = {"grant_type": "password", "username": user, "password": password}
        if code or secret:
            fields["totp"] = code or totp(secret, self.now())
        try:
            grant = self.request(**fields)
        except HttpError as error:
            if error.temporary or error.status == 0:
                raise
            self.refused = LoginError(
                "login of %s (from %s): refused: %s; an account with two factors also needs the "
                "right CDSE_TOTP or CDSE_TOTP_SECRET" % (user, source, error))
            raise self.refused from error
        log.info("token: logged in as %s, from %s", user, source)
        return grant

    def request(self, **fields):
        began = self.clock()
        return parse_grant(self.post(self.url, dict(fields, client_id="cdse-public")), began)

    def logout(self):
        """Give the session back, best effort; not where other processes may use it."""
        with self.lock:
            grant, self.grant = self.grant, None
        if grant and grant.refresh and not self.cache:
            with contextlib.suppress(DataSpaceError):
                self.post(re.sub(r"/token$", "/logout", self.url),
                          {"client_id": "cdse-public", "refresh_token": grant.refresh})


class Session(contextlib.AbstractContextManager):
    """What the requests of one run share: connections, waits, the access token, the stop flag.

    Use it in a `with` block, which logs out at the end.  May be used by many threads, and pickled
    (without its token).  `sleep`, `clock` and `environ` are for tests and embedding.
    """

    def __init__(self, timeout=60, retry=Retry(), trusted=(), token_url=None, connections=4,
                 environ=os.environ, sleep=None, clock=time.monotonic):
        self.timeout, self.retry, self.connections = timeout, retry, connections
        self.trusted, self.environ, self.clock = tuple(trusted), environ, clock
        self.token_url = token_url or environ.get("CDSE_TOKEN_URL") or TOKEN_URL
        self.stopped = threading.Event()
        self.pause = sleep or self.stopped.wait
        self.http = Http(timeout, self.trusted)
        self.slots = Slots(connections, self.check_stop)
        self.token = Token(self.post, self.token_url, environ, clock, self.sleep)

    def __reduce__(self):
        # the environment may hold a password: the copy has its own, and its own clock and waits
        return type(self), (self.timeout, self.retry, self.trusted, self.token_url,
                            self.connections)

    def __exit__(self, kind=None, *error):
        # a signal waits for no one
        if not self.stopped.is_set() and (kind is None or issubclass(kind, Exception)):
            self.token.logout()

    def sleep(self, seconds):
        """Wait so many seconds; raise Stopped at once when the run is stopped."""
        self.pause(seconds)
        self.check_stop()

    def note(self, request):
        """Take note of a request to a catalogue."""
        log.debug("request: %s", urllib.parse.unquote(request.url))

    def check_stop(self):
        if self.stopped.is_set():
            raise Stopped("stopped")

    def stop(self):
        """Let no request begin or go on, and no wait last, from any thread."""
        self.stopped.set()

    def retrying(self, what, action, retry=None):
        """Return action(), tried again after temporary errors with growing waits.

        The only retry loop of this file; the last try raises its own error.
        """
        retry = retry or self.retry
        for tries in itertools.count(1):
            self.check_stop()
            try:
                return action()
            except DataSpaceError as error:
                if not error.temporary or tries >= retry.maxtry:
                    raise
                seconds = retry.wait(tries, getattr(error, "retry_after", None))
                said = error if what in str(error) else "%s: %s" % (what, error)
                log.warning("%s; try %d of %d in %.3g s", said, tries + 1, retry.maxtry, seconds)
            self.sleep(seconds)

    def read(self, response, url):
        """Return the whole body of a response, as bytes."""
        body = []
        for data in chunks(response, url, self.timeout, self.clock, LARGEST_PAGE):
            self.check_stop()
            body.append(data)
        return b"".join(body)

    def read_json(self, request, retry=None):
        """Return the decoded JSON object of a catalogue's answer; anything else is temporary."""
        headers, data = {"Accept": "application/json"}, None
        if request.body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(request.body).encode("utf-8")

        def ask():
            with self.http.open(request.url, headers, data) as response:
                return decode_json(self.read(response, request.url), request.url)
        return self.retrying("catalogue", ask, retry)

    def login(self, url):
        """Get an access token for the host of a url now; raise LoginError or HttpError."""
        self.retrying("token", lambda: self.token.get(host_of(url)))

    def post(self, url, fields):
        """Return the body of the answer to a form, sent once: who needs the token tries again."""
        self.check_stop()
        data = urllib.parse.urlencode(fields, errors="surrogateescape").encode("ascii")
        with self.http.open(url, {}, data) as response:
            return self.read(response, url)

    def open(self, url, headers={}):
        """Return the open response for a url that may need the token, renewed once on a 401."""
        self.check_stop()
        if not may_see_token(url, self.http.trusted):
            return self.http.open(url, headers)
        token = self.token.get(host_of(url))
        try:
            response = self.http.open(url, headers, token=token)
        except HttpError as error:      # a redirect may end at a host that was shown no token
            if error.status != 401 or not may_see_token(error.url, self.http.trusted):
                raise
            self.token.reject(token, error)
            response = self.http.open(url, headers, token=self.token.get(host_of(url)))
        self.token.doubted = False
        return response


def decode_json(body, url):
    """Return the JSON object in a body, or raise a temporary HttpError that shows its begin."""
    page = None
    with contextlib.suppress(*UNREADABLE):
        page = json.loads(body.decode("utf-8-sig"))
    if not isinstance(page, dict):
        raise failure(url, "no JSON object, but %d bytes that begin with %r" % (
            len(body), body[:40].decode("utf-8", "replace")), 200)
    return page


class Slots:
    """How many transfers may be open at once; fewer after the service complained."""

    def __init__(self, limit, check_stop):
        self.limit, self.busy, self.change = limit, 0, threading.Condition()
        self.check_stop = check_stop

    def __enter__(self):
        with self.change:
            while self.busy >= self.limit:
                self.change.wait(0.2)
                self.check_stop()
            self.busy += 1
            return self.limit

    def __exit__(self, *error):
        with self.change:
            self.busy -= 1
            self.change.notify()

    def shrink(self, limit):
        """Allow one less than `limit`, where that is still the limit: once for many complaints."""
        with self.change:
            if 1 < limit == self.limit:
                self.limit -= 1
                log.warning("too many connections, the service says; going on with %d", self.limit)


################ Catalogues ################

# An adapter does no input or output: first(query) gives the first Request, parse(page, query,
# request) the products of a decoded page, None if it is no page of products, and the next Request
# or None.  OData and OpenSearch refuse to skip more than 10,000 and stop linking there, so their
# lists are walked by start time: the next page begins at the last start seen, and the ids seen
# before are dropped by search().  So each page holds something that was seen, else it is not the
# one asked for; and the list ends where that is all, whatever pages say or leave out.

CATALOGUE_URL = "https://catalogue.%s" % DOMAIN
DOWNLOAD_URL = "https://download.%s/odata/v1/Products({product_id})/$value" % DOMAIN
PAGE = {"odata": 1000, "opensearch": 500, "stac": 100}
SKIP_MAX = 10000                # both walked services refuse more
SERVER_MARGIN = 5.0             # degrees: footprints are drawn planar, simplified and bent
SERVER_LATITUDE = 75.0          # degrees: planar tests are wrong near the poles
S5P = "SENTINEL-5P"
MISSIONS = ["SENTINEL-1", "SENTINEL-2", "SENTINEL-3", S5P, "SENTINEL-6"]
EARLIEST, LATEST = datetime.datetime(1900, 1, 1), datetime.datetime(9000, 1, 1)


class Query(NamedTuple):
    """What is asked: `collection` in any spelling, `start` to `end` naive UTC, `box` or None.

    `api` is opensearch, odata, stac or auto; `server_box` says whether the service filters by
    area as well; `footprints` whether they are needed at all; `selected` whether OData is asked for
    the fields that are used only.
    """

    url: str
    collection: str
    producttype: str
    start: datetime.datetime
    end: datetime.datetime
    box: object = None
    api: str = "auto"
    server_box: bool = False
    footprints: bool = True
    selected: bool = True


def mission(collection):
    """Return the catalogue's spelling, SENTINEL-5P, of Sentinel5P or SENTINEL-5P alike."""
    name = re.sub("[-_ ]", "", collection).upper().replace("SENTINEL", "SENTINEL-")
    return name if name in MISSIONS else collection


def has_footprint(collection, producttype):
    """Return whether all catalogues draw footprints for a product type."""
    return collection != S5P or not producttype.startswith(
        ("L1B_IR_", "AUX_", "L2__O3_TCL"))


def longest_product(query):
    """Return the time that no product of this type exceeds, to find those that began before."""
    kind = query.producttype
    if query.collection == S5P:
        days = 8 if kind.startswith(("L2__O3_TCL", "AUX_")) else 1
    elif query.collection not in MISSIONS or kind.startswith("AUX_") or kind.endswith("AX"):
        days = 36525            # mosaics, models, auxiliary data: nobody says how long they hold
    else:
        days = 32 if kind.startswith("SY_") or not kind else 1
    return datetime.timedelta(days=days)


def wider_boxes(query):
    """Return the boxes to send to the service, none where its test would be wrong or useless."""
    box = query.box
    if not (query.server_box and box) or max(abs(box.south), abs(box.north)) > SERVER_LATITUDE:
        return []
    width = (box.east - box.west) % 360 or (360 if box.east != box.west else 0)
    west = (box.west - SERVER_MARGIN + 180) % 360 - 180
    east = west + width + 2 * SERVER_MARGIN
    south, north = box.south - SERVER_MARGIN, box.north + SERVER_MARGIN
    if east - west >= 360:
        west, east = -180.0, 180.0
    if east <= 180:
        return [Box(west, south, east, north)]
    return [Box(west, south, 180.0, north), Box(-180.0, south, east - 360, north)]


def ring_of(box):
    west, south, east, north = box
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def wkt_of(boxes):
    """Return a POLYGON, or a MULTIPOLYGON of two boxes."""
    rings = ["((%s))" % ",".join("%g %g" % (lon, lat) for lon, lat in ring_of(box))
             for box in boxes]
    return "POLYGON" + rings[0] if len(rings) == 1 else "MULTIPOLYGON(%s)" % ",".join(rings)


def url_with(base, **parameters):
    return base + "?" + urllib.parse.urlencode(parameters, quote_via=urllib.parse.quote,
                                               safe="$,:/()'=")


def next_in_walk(products, announced, request):
    """Return where the walk by start time goes on: (since, skip), or None at its end.

    Where a page holds one start time only, all but its last product are skipped.  `skip` is None
    on the first page, which alone may be empty.
    """
    since, skip = request.place
    if not products and not announced and skip is None:
        return None
    starts = [product.start for product in products]
    last = whole(starts[-1]) if starts else datetime.datetime.min
    if starts != sorted(starts) or last < since or skip is not None and not any(
            whole(start) == since for start in starts):
        raise incomplete(request, "the page does not hold what was asked for, by start time")
    if last > since:
        return last, 0
    if len(products) == 1 and not announced:
        return None
    skip = (skip or 0) + len(products) - 1
    if skip > SKIP_MAX:
        raise incomplete(request, "more than %d products start at %s" % (SKIP_MAX, last))
    return last, skip


def incomplete(request, why):
    return CatalogueError("%s: %s; the list can't be completed, try again later"
                          % (shown(request.url), why))


def whole(time_):
    """Return a time cut to milliseconds, in which services are asked."""
    return time_.replace(microsecond=time_.microsecond // 1000 * 1000)


def listed(page, name, request):
    """Return the list of that name in a page; raise CatalogueError where there is none."""
    if not isinstance(page.get(name), list):
        raise CatalogueError("%s: the answer has no list of %r" % (shown(request.url), name))
    return page[name]


def product_of(product_id, filename, producttype, start, end, orbit, processing, size, md5,
               published, geometry):
    """Return the Product of an entry; None, zeros and odd values mean unknown."""
    product = Product(
        product_id, safe_name(filename), producttype or "", parse_time(start), parse_time(end),
        str(orbit or ""), processing or "",
        size if type(size) is int and 0 < size < 1 << 63 else 0, md5_text(md5), published or "",
        geometry or None)
    texts = product.producttype + product.orbit + product.processing + product.published
    if not PLAIN_ID.match(product_id) or not texts.isprintable():
        raise ValueError("%.200r, %.200r: not plain texts" % (product_id, texts))
    return product


def md5_text(text):
    """Return an MD5 in lower case, or an empty text for anything else, zeros too."""
    return text.lower() if MD5.match(str(text)) else ""


class Walked:
    """An adapter whose list is walked by start time, from before the first that may overlap."""

    @classmethod
    def first(cls, query):
        return cls.request(query, query.start - longest_product(query))

    @classmethod
    def parse(cls, page, query, request):
        products = [cls.product(entry) for entry in listed(page, cls.ENTRIES, request)]
        links = (page.get("properties") or {}).get("links") or []       # of OpenSearch
        announced = page.get("@odata.nextLink") or any(link.get("rel") == "next" for link in links)
        place = next_in_walk(products, announced, request)
        return products, cls.request(query, *place) if place else None


class OData(Walked):
    """https://catalogue.dataspace.copernicus.eu/odata/v1"""

    ENTRIES = "value"
    SELECT = "Id,Name,ContentLength,ContentDate,PublicationDate,Checksum"

    @staticmethod
    def request(query, since, skip=None):
        # fewer of a page where each brings a footprint of 300 points
        fields = {"$filter": OData.condition(query, since), "$orderby": "ContentDate/Start asc",
                  "$top": max(2, PAGE["odata"] // (4 if query.footprints else 1))}
        if skip:
            fields["$skip"] = skip
        if query.collection != S5P:
            fields["$expand"] = "Attributes"        # orbit and timeliness are only there
        elif query.selected:
            fields["$select"] = OData.SELECT + ",GeoFootprint" * query.footprints
        return Request(url_with(query.url + "/Products", **fields), None, (since, skip))

    @staticmethod
    def condition(query, since):
        terms = ["Collection/Name eq '%s'" % query.collection]
        if query.producttype:
            terms.append("Attributes/OData.CSC.StringAttribute/any(att:att/Name eq 'productType' "
                         "and att/OData.CSC.StringAttribute/Value eq '%s')"
                         % query.producttype.replace("'", "''"))
        terms += ["ContentDate/Start ge " + format_time(since),
                  "ContentDate/Start le " + format_time(query.end)]
        if query.collection != S5P:
            terms.append("ContentDate/End ge " + format_time(query.start))
        areas = ["OData.CSC.Intersects(area=geography'SRID=4326;%s')" % wkt_of([box])
                 for box in wider_boxes(query)]
        return " and ".join(terms + ["(%s)" % " or ".join(areas)] * bool(areas))

    @staticmethod
    def product(value):
        """Return the Product of one OData entity, of a list or alone, old form or new."""
        told = {item.get("Name"): item.get("Value") for item in value.get("Attributes") or ()}
        checksums = {entry.get("Algorithm"): entry.get("Value")
                     for entry in value.get("Checksum") or ()}
        return product_of(
            value["Id"], value["Name"], told.get("productType"), value["ContentDate"]["Start"],
            value["ContentDate"]["End"], told.get("orbitNumber"), told.get("timeliness"),
            value.get("ContentLength"), checksums.get("MD5"), value.get("PublicationDate"),
            value.get("GeoFootprint") or geometry_from_wkt(value.get("Footprint")))


class OpenSearch(Walked):
    """https://catalogue.dataspace.copernicus.eu/resto/api, switched off on 2 March 2026"""

    ENTRIES = "features"

    @staticmethod
    def request(query, since, skip=None):
        collection = query.collection.replace("SENTINEL-", "Sentinel")
        # the service lists what lies within its period, so it is asked for a longer one
        fields = {"startDate": format_time(since), "maxRecords": PAGE["opensearch"],
                  "completionDate": format_time(query.end + longest_product(query)),
                  "sortParam": "startDate", "sortOrder": "ascending"}
        boxes = wider_boxes(query)
        if query.producttype:
            fields["productType"] = query.producttype
        if skip:
            fields["index"] = skip + 1
        if boxes:
            fields["geometry"] = wkt_of(boxes)
        url = "%s/collections/%s/search.json" % (query.url, urllib.parse.quote(collection))
        return Request(url_with(url, **fields), None, (since, skip))

    @staticmethod
    def product(feature):
        """Return the Product of one resto feature, old form or new; resto tells no MD5."""
        told = feature["properties"]
        download = (told.get("services") or {}).get("download") or {}
        return product_of(
            feature["id"], told["title"], told.get("productType"), told["startDate"],
            told["completionDate"], told.get("orbitNumber"), told.get("timeliness"),
            download.get("size"), None, told.get("published"), feature.get("geometry"))


class Stac:
    """https://stac.dataspace.copernicus.eu/v1

    A Sentinel-5P collection is one product type of one stream, so its name is made here.  For the
    other missions, and where nothing is found, the list of collections is asked: a wrong name
    would bring an empty answer, not an error.
    """

    UNUSED = ",".join("-properties." + name for name in (     # most of an item's 20 to 70 kB
        "cube:variables", "cube:dimensions", "auth:schemes", "storage:schemes"))

    @staticmethod
    def first(query):
        names = Stac.names(query)
        return Stac.search(query, names) if names else Stac.collections(query)

    @staticmethod
    def collections(query):
        return Request(query.url + "/collections?limit=1000", None, [])     # known so far

    @staticmethod
    def names(query):
        """Return the collections that hold a Sentinel-5P type, or one given as such."""
        if query.collection.startswith("sentinel-"):
            return [query.collection]
        if query.collection != S5P:
            return []
        level, _, kind = query.producttype.lower().partition("_")
        kind = "sentinel-5p-%s-%s-" % (level[:2], re.sub("_+", "-", kind.strip("_")))
        return [kind + stream for stream in ("nrti", "offl", "rpro")]

    @staticmethod
    def search(query, names, sure=False):
        """Return the request for items; `sure`: the collections are there, so none may be found."""
        url, boxes = query.url + "/search", wider_boxes(query)
        fields = {"collections": ",".join(names), "limit": PAGE["stac"], "datetime": "%s/%s" % (
            format_time(query.start), format_time(query.end))}
        typed = query.producttype and not Stac.names(query)
        if len(boxes) < 2:
            fields.update({"sortby": "+properties.datetime", "fields": Stac.UNUSED})
            if typed:
                fields["filter-lang"] = "cql2-text"
                fields["filter"] = "\"product:type\"='%s'" % query.producttype.replace("'", "''")
            if boxes:
                fields["bbox"] = "%g,%g,%g,%g" % boxes[0]
            return Request(url_with(url, **fields), None, sure)
        # by POST: a bbox over the antimeridian is read the long way round
        fields.update(collections=names, sortby=[{"field": "datetime", "direction": "asc"}],
                      intersects={"type": "MultiPolygon",
                                  "coordinates": [[ring_of(box)] for box in boxes]})
        if typed:
            fields["filter-lang"] = "cql2-json"
            fields["filter"] = {"op": "=", "args": [{"property": "product:type"},
                                                    query.producttype]}
        return Request(url, fields, sure)

    @staticmethod
    def parse(page, query, request):
        following = Stac.following(page, request)
        if "collections" in page:
            return None, Stac.after_collections(page, following, query, request)
        products = [Stac.product(item) for item in listed(page, "features", request)]
        if not (products or following or request.place):
            following = Stac.collections(query)
        return products, following

    @staticmethod
    def after_collections(page, following, query, request):
        """Return the search of the mission's collections that hold the type; raise if none does."""
        known = request.place
        more = [one for one in listed(page, "collections", request) if one not in known]
        if following and more:
            return following._replace(place=known + more)
        if following:
            raise incomplete(request, "a page of collections brings nothing new")
        wanted, prefix = Stac.names(query), query.collection.lower() + "-"
        found = [one["id"] for one in known + more if one["id"] in wanted or (
            not wanted and one["id"].startswith(prefix) and may_hold(one, query.producttype))]
        if not found:
            raise CatalogueError(
                "%s: no collection for %s %s; this service holds only the types that its "
                "collections name, %s/odata/v1 holds all" % (
                    shown(request.url), query.collection, query.producttype, CATALOGUE_URL))
        return Stac.search(query, found, sure=True)

    @staticmethod
    def following(page, request):
        """Return the request that a page's next link asks for, or None."""
        for link in page.get("links") or []:
            if link.get("rel") == "next":
                body = link.get("body") if link.get("method", "GET").upper() == "POST" else None
                if body is not None and link.get("merge"):
                    body = dict(request.body or {}, **body)
                return Request(urllib.parse.urljoin(request.url, link["href"]), body, True)
        return None

    @staticmethod
    def product(item):
        """Return the Product of one item.

        The name is that of the asset: ids lack the extension, and those of O3_TCL are rewritten.
        """
        told, assets = item["properties"], item.get("assets") or {}
        asset = next((assets[key] for key in assets if key.lower() in ("netcdf", "product")), {})
        s3, https = asset.get("href") or "", (asset.get("alternate") or {}).get("https") or {}
        href = https.get("href") or s3
        path = asset.get("file:local_path") or (s3 if s3.startswith("s3:") else item["id"])
        filename = re.sub(r"\.zip$", "", path.rstrip("/").rpartition("/")[2])
        checksum = asset.get("file:checksum") or ""
        if not href_id(href):
            raise ValueError("no product id in %s" % item["id"])
        return product_of(
            href_id(href), filename, told.get("product:type"),
            told.get("start_datetime") or told["datetime"],
            told.get("end_datetime") or told["datetime"], told.get("sat:absolute_orbit"),
            told.get("product:timeliness_category"), asset.get("file:size"),
            # multihash of MD5: varint code 0xd5 0x01, length 16
            checksum[6:] if checksum.startswith("d50110") else "", told.get("published"),
            item.get("geometry"))


def may_hold(collection, producttype):
    """Return whether a STAC collection may hold a product type, as far as it says."""
    types = (collection.get("summaries") or {}).get("product:type")
    return not producttype or not types or producttype in types


ADAPTERS = {"odata": OData, "opensearch": OpenSearch, "stac": Stac}


def api_of(url):
    """Return which service a base url is, told from its path or host; raise ValueError."""
    parts = split_url(url)
    for api, sign in (("opensearch", "/resto"), ("odata", "/odata"), ("stac", "stac"),
                      ("stac", "/v1")):
        if sign in (parts.hostname or "") + parts.path:
            return api
    raise ValueError("can't tell the service from %r; set api to opensearch, odata or stac" % url)


def search(query, session):
    """Yield every Product that the catalogue lists for a query, each once, or raise.

    Products are those of the service's own, wider selection: in_period() and in_area() have the
    last word.
    Raises CatalogueError or HttpError: then what was yielded is not the whole list.
    """
    query, request, page = first_page(query, session)
    seen, barren = set(), 0
    while True:
        products, following = page
        fresh = {product.product_id: product for product in products or ()
                 if product.product_id not in seen}
        seen.update(fresh)
        yield from fresh.values()
        if following is None:
            return
        # In a walk one page in a row may bring nothing new: the start time it begins with.
        if products is not None:
            barren = 0 if fresh else barren + 1
        if barren > (0 if products and query.api == "stac" else 1):
            raise incomplete(request, "page after page brings nothing new, but announces more")
        request, page = following, turn_page(query, following, session)


def first_page(query, session):
    """Return the query as the service takes it, its first request and page.

    Where OpenSearch is retired, as two tries may tell, OData beside it is asked; a service that
    does not know one of the fields to select, for whole entries.
    """
    api = api_of(query.url) if query.api == "auto" else query.api
    substitute = odata_beside(query.url) if query.api == "auto" and api == "opensearch" else None
    query = query._replace(
        api=api, url=query.url.rstrip("/"), collection=mission(query.collection),
        start=whole(max(query.start, EARLIEST)),
        end=whole(min(query.end, LATEST) + datetime.timedelta(microseconds=999)))    # rounded up
    request = ADAPTERS[api].first(query)
    retry = session.retry._replace(maxtry=min(2, session.retry.maxtry)) if substitute else None
    try:
        return query, request, turn_page(query, request, session, retry)
    except (HttpError, CatalogueError) as error:
        if substitute:
            log.warning("%s; the OpenSearch service was retired in March 2026, so OData is asked "
                        "instead (set url to %s to be spared this message)", error, substitute)
            return first_page(query._replace(api="odata", url=substitute), session)
        if "$select" in request.url and getattr(error, "status", 0) == 400:
            return first_page(query._replace(selected=False), session)
        if api != "opensearch":
            raise
        raise CatalogueError(
            "%s; an OpenSearch service (resto) was expected at the setting url, that of the Data "
            "Space was retired in March 2026: set url to %s/odata/v1, or api to auto"
            % (error, CATALOGUE_URL)) from error


def turn_page(query, request, session, retry=None):
    """Return the products of a page and the next request."""
    session.note(request)
    page = session.read_json(request, retry)
    try:
        return ADAPTERS[query.api].parse(page, query, request)
    except UNREADABLE as error:
        raise CatalogueError("%s: an answer that can't be read (%s: %s)" % (
            shown(request.url), type(error).__name__, error)) from error


def odata_beside(url):
    """Return the OData base beside a retired OpenSearch base of the Data Space, else None."""
    return "%s://%s/odata/v1" % split_url(url)[:2] if host_of(url).endswith("." + DOMAIN) else None


################ Table ################

COLUMNS = ("orbit", "start_time", "end_time", "processing", "collection", "processor_version",
           "filename", "href")


HREF = re.compile(r"(https?|s3)://[\x21-\x7e]+\Z")


class Row(NamedTuple):
    """A line of the table: the eight columns, then those that `output.columns` may add."""

    orbit: str
    start_time: str
    end_time: str
    processing: str
    collection: str
    processor_version: str
    filename: str
    href: str
    size: str = ""              # bytes
    md5: str = ""
    overlap: str = ""           # covered share of the area, per cent
    product_id: str = ""
    producttype: str = ""
    published: str = ""


def row_of(product, download_url, fraction=None):
    """Return the Row of a product: what the file name tells, else what the catalogue says."""
    told = parse_name(product.filename)
    start = table_time(told["start"]) if "start" in told else str(product.start)[:19]
    end = table_time(told["end"]) if "end" in told else str(product.end)[:19]
    return Row(
        told.get("orbit") or product.orbit, start, end,
        sys.intern(told.get("processing", product.processing)),
        sys.intern(told.get("collection", "")), sys.intern(told.get("processor_version", "")),
        product.filename, download_url.replace("{product_id}", product.product_id),
        str(product.size or ""), product.md5, "" if fraction is None else "%.2f" % (100 * fraction),
        product.product_id, sys.intern(told.get("producttype", product.producttype)),
        product.published)


def newest_first(rows):
    """Return the rows in the order of the table: newest start first, equal ones by file name."""
    return sorted(sorted(rows, key=lambda row: (row.filename, row.product_id)),
                  key=lambda row: row.start_time, reverse=True)


def write_table(rows, path, columns=COLUMNS, dmode=None):
    """Write the rows as csv, beside and renamed: the old table or the new one, never a part."""
    picked = operator.attrgetter(*columns) if len(columns) > 1 else (
        lambda row: [getattr(row, columns[0])])
    make_directories(os.path.dirname(path), dmode)
    write_csv(path, columns, map(picked, rows))


def write_csv(path, header, lines):
    with replacing(path) as out:
        writer = csv.writer(out, delimiter=";", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def read_table(path):
    """Return the rows of a csv table, old or new, columns in any order; further ones are ignored.

    Raises TableError with the line of the first row that is broken.
    """
    lines = csv.reader(())
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            lines = csv.reader(text, delimiter=";", strict=True)
            header = [name.strip() for name in next(lines, [])]
            missing = [name for name in ("filename", "href") if name not in header]
            if missing:
                raise ValueError("no column %s in the header; expected columns such as %s"
                                 % (" and ".join(missing), ";".join(COLUMNS)))
            return [checked_row(header, fields) for fields in lines if fields]
    except (OSError, UnicodeError) as error:
        raise TableError("%s: can't be read: %s" % (path, error)) from error
    except (ValueError, csv.Error) as error:
        raise TableError("%s:%d: %s" % (path, max(1, lines.line_num), error)) from None


def checked_row(header, fields):
    """Return the Row of one line, or raise ValueError."""
    if len(fields) != len(header):
        raise ValueError("%d fields; the header has %d" % (len(fields), len(header)))
    told = {name: field.strip() for name, field in zip(header, fields) if name in Row._fields}
    row = Row(**dict(dict.fromkeys(COLUMNS, ""), **told))
    safe_name(row.filename)
    if not HREF.match(row.href) or not host_of(row.href):
        raise ValueError("%r is no href; expected https://... or s3://..." % row.href[:200])
    if not re.match(r"[0-9]{0,18}\Z", row.size):
        raise ValueError("%r is no size in bytes" % row.size[:40])
    return row._replace(md5=md5_text(row.md5))


def write_geojson(rows, geometries, path, dmode=None):
    """Write a FeatureCollection of RFC 7946; geometries are JSON texts by product id."""
    make_directories(os.path.dirname(path), dmode)
    with replacing(path) as out:
        out.write('{"type": "FeatureCollection", "features": [')
        for number, row in enumerate(rows):
            feature = json.dumps({"type": "Feature", "id": row.product_id,
                                  "properties": row._asdict()})
            out.write('%s%s, "geometry": %s}' % (",\n" if number else "", feature[:-1],
                                                 geometries[row.product_id]))
        out.write("]}\n")


################ Downloads ################

POLL = 0.5                      # seconds between looks at a file that another process fetches
ABANDONED = 120                 # seconds without a write after which a part counts as left behind
HEAD = 512                      # first bytes of a body by which it is judged
ZIP = b"PK\x03\x04"
# First bytes of what a name promises: netCDF-4 is HDF5, older netCDF "CDF", a zip may hold it.
SIGNATURES = {".nc": (b"\x89HDF\r\n\x1a\n", b"CDF", ZIP), ".zip": (ZIP,)}

PART_ENDING = re.compile(r"\.(\w+-\d+)-\d+\.part$")


class Task(NamedTuple):
    """A file to fetch: where from, where to, and what is known of it (0 and empty: unknown)."""

    href: str
    path: str
    size: int = 0
    md5: str = ""


class Outcome(NamedTuple):
    """How a file ended.

    `state` is "verified" (its MD5), "size only", "unverified", "present" (was there already) or
    "failed"; `bytes` that came over the line, `seconds` it took, `message` why it failed.
    """

    filename: str
    state: str
    bytes: int = 0
    seconds: float = 0.0
    message: str = ""


def new_md5():
    """Return an MD5 object, None where the system forbids MD5 (FIPS)."""
    for options in ({"usedforsecurity": False}, {}):        # before Python 3.9 without it
        with contextlib.suppress(TypeError, ValueError):
            return hashlib.md5(**options)
    return None


class Part:
    """The file beside the target into which bytes go, counted and hashed, until they are checked.

    Its name holds host, process and a number, so that no one else writes to it.
    """

    alive: set = set()          # the parts that this process is at, by path

    def __init__(self, target):
        self.target, self.path, self.file = target, part_name(target), None
        self.came, self.faults = 0, collections.Counter()
        Part.alive.add(self.path)
        self.reset()

    def reset(self):
        """Begin again with an empty file."""
        if self.file:
            self.file.close()
        discard(self.path)
        self.file = open(self.path, "xb")
        self.count, self.md5, self.etag, self.head = 0, new_md5(), None, b""

    def write(self, data):
        with file_errors(self.target):  # never taken for a fault of where the data is from
            self.file.write(data)
            self.file.flush()           # a full disk is told now, and a killed run loses nothing
        self.head += data[:HEAD - len(self.head)]
        self.count += len(data)
        if self.md5:
            self.md5.update(data)

    def leave(self):
        """Close the part for good; one with bytes in it is kept for the next run."""
        with contextlib.suppress(OSError):
            self.file.close()
        Part.alive.discard(self.path)
        if not self.count:
            discard(self.path)


def parts_beside(target):
    """Return the parts of a target, whoever made them: {path: (bytes, last written, owner)}."""
    folder, name = os.path.split(target)
    parts = {}
    for other in os.listdir(folder or "."):
        found = other.startswith(name) and PART_ENDING.match(other, len(name))
        if found:
            path = os.path.join(folder, other)
            with contextlib.suppress(OSError):      # gone: its owner is done with it
                about = os.stat(path)
                parts[path] = about.st_size, about.st_mtime, found.group(1)
    return parts


def is_abandoned(path, written, owner, now):
    """Return whether nobody writes to a part any more.

    Known at once where its process was on this machine; else by the time of its last write.
    """
    if owner == owner_name():
        return path not in Part.alive
    host, _, pid = owner.rpartition("-")
    if host == owner_name().rpartition("-")[0] and os.name == "posix":
        try:
            with contextlib.suppress(PermissionError):
                os.kill(int(pid), 0)
        except (ProcessLookupError, OverflowError):
            return True
    return now - written > ABANDONED


def claim(part, task):
    """Return whether nobody else is at the task's file; then take over what others left of it.

    Two that come at the same time see each other's part, step back and come again.
    """
    now = os.fstat(part.file.fileno()).st_mtime     # by the clock of the disk, as all the others
    others = parts_beside(task.path)
    others.pop(part.path, None)
    if not all(is_abandoned(path, written, owner, now)
               for path, (_, written, owner) in others.items()) or is_present(task):
        return False
    for path in sorted(others, key=others.get, reverse=True):       # the longest first
        inherit(part, path, task)
    return True


def inherit(part, left, task):
    """Take over the bytes of a part that someone left behind, if they may fit; it is gone then.

    The rename gives it to one taker only.  The bytes are copied, not appended to: a writer that
    was only asleep then wakes up to a file that is no one's.
    """
    mine = part_name(task.path)
    with contextlib.suppress(OSError):          # another process was faster, or it is not ours
        os.replace(left, mine)
        # only an MD5 can tell whether old bytes and new ones belong together
        if task.md5 and not part.count and os.path.getsize(mine) <= (task.size or math.inf):
            with open(mine, "rb") as source:
                shutil.copyfileobj(source, part, CHUNK)
    discard(mine)


def is_page(head, name):
    """Return why the first bytes of a body are no product, or an empty text."""
    start, ending = head.lstrip().lower(), os.path.splitext(name)[1].lower()
    if start.startswith((b"<?xml", b"<error")) and ending not in (".xml", ".eof"):
        return "an XML page"
    if start.startswith(b"<!doctype html") or b"<html" in start:
        return "an HTML page"
    if start.startswith((b"{\"", b"[{", b"{\n", b"{ ")) and not ending.endswith("json"):
        return "a JSON text"
    if head and not head.startswith(SIGNATURES.get(ending, b"")):
        return "no %s file (it begins with %r)" % (ending, head[:16])
    return ""


def receive(session, task, part, on_bytes):
    """Bring the rest of the file into the part, or raise; one try.

    A part goes on only by 206 with the right range of an unchanged object; anything else begins
    again, and a page of words never touches the bytes that are there.
    """
    headers = {}
    if part.count and (part.etag or task.md5):
        headers["Range"] = "bytes=%d-" % part.count
        if part.etag:
            headers["If-Range"] = part.etag
    # a zip may come where the catalogue describes the file in it
    most = 2 * task.size + (1 << 20) if task.size else math.inf
    with session.slots as limit:
        try:
            with session.open(task.href, headers) as response:
                body = chunks(response, task.href, session.timeout, session.clock, most)
                for data in begin(response, body, task, part):
                    part.write(data)
                    part.came += len(data)
                    on_bytes(len(data))
                    session.check_stop()
        except HttpError as error:
            if error.status == 429:
                session.slots.shrink(limit)
            if error.status == 416 and headers:     # no bytes after those here: begin again
                part.reset()
                error.temporary = True
            raise


def begin(response, body, task, part):
    """Return the chunks of a body that may be written to the part, which is ready for them."""
    name, first = os.path.basename(task.path), b""
    for data in body:           # a slow line brings a few bytes at a time
        first += data
        if len(first) >= HEAD:
            break
    etag = response.headers.get("ETag", "")
    if response.status == 206:
        same = response.headers.get("Content-Range", "").startswith("bytes %d-" % part.count)
        if not (part.count and same and part.etag in (None, etag)):
            part.reset()
            raise CheckError("%s: the service sent another range, or of another file, than asked; "
                             "beginning again" % name)
    else:
        chunked = response.headers.get("Transfer-Encoding")
        if body_length(response) is None and not (chunked or task.size or task.md5):
            raise CheckError("%s: neither service nor catalogue tells how long it is; it can't be "
                             "checked" % name, temporary=False)
        wrong = is_page(first[:HEAD], name)
        if wrong:
            said = service_message(first) if b"\0" not in first[:4096] else ""
            raise CheckError(": ".join(filter(None, (name, "the service sent " + wrong, said))))
        if part.count:
            part.reset()
    part.etag = etag if etag.startswith('"') else None      # only a strong one names the bytes
    return itertools.chain([first], body)


def verify(task, part):
    """Return how the bytes of a part were checked; raise CheckError where they are wrong.

    The part is empty again then.  The same wrong bytes three times are taken for an answer.
    """
    count = part.count
    try:
        return checked(task, part)
    except CheckError as error:
        part.reset()
        part.faults[count, str(error)] += 1
        hopeless = part.faults[count, str(error)] == 3
        raise CheckError("%s: %s%s" % (
            os.path.basename(task.path), error, "; it came like that 3 times, so the catalogue and "
            "the file do not agree" * hopeless), error.temporary and not hopeless) from error


def checked(task, part):
    """Return how the bytes of a part were checked, or raise CheckError.

    A zip where .nc was asked for is unpacked first if it is not what the catalogue describes.  A
    zip of which nothing is known, as of directory products, is tested by the checksums in it.
    """
    known = task.size or task.md5
    if part.head.startswith(ZIP):
        if task.path.endswith(".nc") and (mismatch(task, part) or not known):
            unpack(part, task.size)
        elif not known:
            with opened_zip(part.path) as archive:
                broken = archive.testzip()
                if broken:
                    raise zipfile.BadZipFile("%s has another checksum" % broken)
            return "verified"
    wrong = is_page(part.head, task.path) or mismatch(task, part)
    if wrong:
        raise CheckError(wrong)
    return "verified" if task.md5 else "size only" if task.size else "unverified"


def mismatch(task, part):
    if task.size and part.count != task.size:
        return "%d bytes came, %d were expected" % (part.count, task.size)
    if task.md5 and part.md5.hexdigest() != task.md5:
        return "MD5 %s came, %s was expected" % (part.md5.hexdigest(), task.md5)
    return "" if part.count else "an empty file came"


@contextlib.contextmanager
def opened_zip(path):
    """Open a zip; whatever zipfile raises for a broken one becomes a CheckError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (DataSpaceError, OSError):
        raise
    except Exception as error:
        raise CheckError("the zip is broken: %s" % error) from error


def unpack(part, size):
    """Replace a zip in the part by the single .nc file it holds; names in it are never paths.

    If the size of the file is known, none of another size is unpacked: it may fill the disk.
    """
    whole = part_name(part.target)
    part.file.close()
    os.replace(part.path, whole)
    try:
        part.reset()
        with opened_zip(whole) as archive:
            members = [item for item in archive.infolist() if item.filename.endswith(".nc")
                       and size in (0, item.file_size)]
            if len(members) != 1:
                raise CheckError("a zip with %d .nc files%s came; one was expected" % (
                    len(members), " of %d bytes" % size if size else ""), temporary=False)
            with archive.open(members[0]) as source:
                shutil.copyfileobj(source, part, CHUNK)
    finally:
        discard(whole)


def fetch(task, session, retry=None, dmode=None, on_bytes=lambda count: None):
    """Bring one file to task.path and return its Outcome: complete and checked, or an error.

    Size and MD5 that the task lacks are asked of the catalogue, once.  A file of the right size
    that is there already is not fetched; one that another process is fetching is waited for.
    Raises DataSpaceError; then nothing is at task.path that was not there before.
    """
    began, name = session.clock(), os.path.basename(task.path)
    with file_errors(task.path):
        task = described(task, session, retry)
        if new_md5() is None:
            task = task._replace(md5="")
        make_directories(os.path.dirname(task.path), dmode)
        while not is_present(task):
            part = Part(task.path)
            try:
                state = claim(part, task) and session.retrying(
                    name, lambda part=part: complete(task, part, session, on_bytes), retry)
            finally:
                part.leave()
            if state:
                return Outcome(name, state, part.came, session.clock() - began)
            session.sleep(POLL * (1 + random.random()))
    return Outcome(name, "present")


def complete(task, part, session, on_bytes):
    """Fill the part, check it and put it in its place; return how it was checked.  One try.

    Returns an empty text if another process took the part over: this one was taken for dead.
    """
    if not os.path.exists(part.path):
        return ""
    if not task.size or part.count != task.size:
        receive(session, task, part, on_bytes)
    state = verify(task, part)
    part.file.close()
    try:
        os.replace(part.path, task.path)
    except FileNotFoundError:
        return ""
    return state


def is_present(task):
    """Return whether the file is there already: only complete ones ever get their final name."""
    size = os.path.getsize(task.path) if os.path.isfile(task.path) else 0
    return size == task.size if task.size else size > 0


def described(task, session, retry=None):
    """Return the task with today's href, and the size and MD5 that the catalogue knows."""
    task = task._replace(href=mend_href(task.href))
    by_name = task.href.startswith("s3://")
    if task.size and task.md5 and not by_name:
        return task
    try:
        product = looked_up(task.href, session, retry)
    except CatalogueError:
        if by_name:
            raise
        return task
    if by_name:
        task = task._replace(href=DOWNLOAD_URL.replace("{product_id}", product.product_id))
    if is_directory_product(product.filename):
        return task                 # what is told of a directory is of its files, not of the zip
    return task._replace(size=task.size or product.size, md5=task.md5 or product.md5)


def looked_up(href, session, retry=None):
    """Return the Product that the catalogue describes for a href; raise CatalogueError if none."""
    base, url = CATALOGUE_URL + "/odata/v1", ""
    if href.startswith("s3://"):
        name = href.rstrip("/").rpartition("/")[2].replace("'", "''")
        url = url_with(base + "/Products", **{"$filter": "Name eq '%s'" % name})
    elif href_id(href):
        base = base if is_data_space(host_of(href)) else href.partition("/Products(")[0]
        url = "%s/Products(%s)" % (base, href_id(href))
    try:
        page = session.read_json(Request(url), retry) if url else {"value": []}
        return OData.product(page.get("value", [page])[0])
    except HttpError as error:
        if error.temporary or error.status not in (400, 404, 422):
            raise
    except UNREADABLE as error:
        log.debug("%s: no description of a product (%s)", shown(url), error)
    raise CatalogueError("%s: the catalogue has no product for this href; is it right?"
                         % shown(href))


def check_space(tasks):
    """Raise FileError where the free space is known to be too small for what is to come."""
    folder = existing_directory(os.path.dirname(tasks[0].path if tasks else ""))
    needed = sum(task.size for task in tasks if not os.path.exists(task.path))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FileError("%s: %s free, but the files need %s; free some space, or choose another "
                        "folder" % (folder, bytes_text(free), bytes_text(needed)), fatal=True)


def existing_directory(path):
    path = os.path.abspath(path)
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def bytes_text(count):
    """Return a number of bytes for people: 63.8 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return "%.*f %s" % (unit != "bytes", count, unit)


def download(tasks, session, dmode=None, on_bytes=lambda count: None, idle=lambda: None):
    """Yield the Outcome of every task as it ends, with up to session.connections at once.

    A file that fails is an Outcome too; a full disk, a refused login or a stop ends the whole with
    its error.  `idle` is called about ten times a second.  Closing the generator stops the run.
    """
    tasks, done = list(tasks), queue.Queue()
    check_space(tasks)
    if new_md5() is None:
        log.warning("this system refuses MD5 (FIPS); files are checked by their size only")
    waiting = iter(tasks)               # each thread takes its next task from it

    def work():
        for task in waiting:
            try:
                done.put(fetch(task, session, None, dmode, on_bytes))
            except Exception as error:          # even a fault of this file must not hang the run
                if getattr(error, "fatal", True):
                    done.put(error)
                    return session.stop()
                done.put(Outcome(os.path.basename(task.path), "failed", message=str(error)))

    # Daemon threads: one that hangs in a system call does not keep the program from ending.
    threads = [threading.Thread(target=work, daemon=True)
               for _ in range(min(session.connections, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        left = len(tasks)
        while left:
            idle()
            with contextlib.suppress(queue.Empty):
                outcome = done.get(timeout=0.1)
                if isinstance(outcome, Exception):
                    raise outcome
                left -= 1
                yield outcome
    except BaseException:
        session.stop()
        for thread in threads:          # most leave their parts at once
            thread.join(0.4 / len(threads))
        raise


################ Options ################

# The settings of an inquiry: a table of readers, which return the value of a text or raise
# ValueError with what is wrong with it, and the defaults.


def matching(pattern, fault):
    """Return a reader that takes texts of this pattern only."""
    def reader(text):
        if not re.match(pattern, text):
            raise ValueError(fault)
        return text
    return reader


def one_of(*choices):
    return matching("(%s)\\Z" % "|".join(choices), "is unknown; expected " + " or ".join(choices))


def of_type(totype, low=None, high=math.inf):
    """Return a reader of a type of converted(), such as "int", within a range."""
    def reader(text):
        value = converted(text, totype)
        if low is not None and not low <= value <= high:
            raise ValueError("is out of range; expected %s" % (
                "%g to %g" % (low, high) if high < math.inf else "%g or more" % low))
        return value
    return reader


def known_collection(text):
    """Return the collection in the catalogue's spelling; both spellings are taken."""
    name = mission(text)
    meant = [] if re.match(r"sentinel-\dp?-", name) else (     # the name of a STAC collection
        difflib.get_close_matches(name.upper(), MISSIONS, 1, 0.8))
    if name not in meant and meant or not re.match(r"[\w.-]+$", name):
        known = (meant or [S5P])[0]
        raise ValueError("is unknown; expected %s or %s" % (
            known.replace("SENTINEL-", "Sentinel"), known))
    return name


def check_columns(names):
    unknown = " ".join(name for name in names if name not in Row._fields)
    if unknown:
        raise ValueError("has no column %s; expected %s" % (unknown, " ".join(Row._fields)))


def column_names(text):
    columns = tuple(re.findall(r"[^\s,;]+", text))
    check_columns(columns)
    return columns or COLUMNS


def folder_template(text):
    check_columns(re.findall(r"%\{(\w+)\}", text))
    return text


def row_condition(text):
    """Return the tree of a condition on columns, written %{orbit} with or without quotes."""
    return parse_expression(re.sub(r"""(["']?)%\{(\w+)\}\1""", r"\2", text))


def host_names(text):
    hosts = text.replace(",", " ").split()
    if not all(re.match(r"[\w.-]+\Z", host) for host in hosts):
        raise ValueError("is no list of hosts; expected names such as zipper.creodias.eu")
    return hosts


REQUIRED = object()
SECONDS = of_type("float", 0, 1e6)

SETTINGS = {        # of an inquiry, after its base: (reader of the text, default)
    "timerange.start": (of_type("datetime"), REQUIRED),
    "timerange.end": (of_type("datetime"), REQUIRED),
    "url": (matching(r"https?://[^/\s@]+(/|$)", "is no url; expected https://HOST/... and no "
                     "password in it"), REQUIRED),
    "api": (one_of("auto", *ADAPTERS), "auto"),
    "collection": (known_collection, REQUIRED),
    "producttype": (str, ""),
    "area": (Box.from_text, None),
    "area.minimum": (of_type("float", 0, 100), 0.0),
    "area.filter": (one_of("local", "server"), ""),
    "selection": (row_condition, None),
    "best": (of_type("bool"), False),
    "download_url": (matching(r"(?=.*\{product_id\})" + HREF.pattern, "is no url with "
                              "{product_id} in it"), DOWNLOAD_URL),
    "output.file": (str, REQUIRED),
    "output.columns": (column_names, COLUMNS),
    "output.geojson": (str, ""),
    "dmode": (directory_mode, None),
    "download.dir": (folder_template, REQUIRED),
    "download.connections": (of_type("int", 1, 20), 4),
    "download.maxtry": (of_type("int", 1), 10),
    "download.nsec_wait": (SECONDS, 5.0),
    "download.nsec_wait_max": (SECONDS, 600.0),
    "timeout": (of_type("float", 0.01, 1e6), 60.0),
    "trusted_hosts": (host_names, []),
    "token_url": (str, None),
}


class Options:
    """The settings of one inquiry, by their names after the base; errors tell file and line."""

    def __init__(self, settings, rcbase=""):
        self.settings, self.rcbase = settings, rcbase

    def find(self, name):
        """Return the text of a setting, empty where there is none, and its place."""
        key = self.settings.find(self.rcbase, name)
        return self.settings.get(key, "str") if key else "", self.settings.place(key)

    def get(self, name, required=False):
        """Return the value of a setting, its default where it is absent or empty."""
        reader, default = SETTINGS[name]
        text, place = self.find(name)
        try:
            if text.strip():
                return reader(text)
        except ValueError as error:
            raise self.wrong(name, error) from None
        if required or default is REQUIRED:
            raise SettingsError("%s: this setting is missing; expected a line '%s : ...'" % (
                name, candidates(self.rcbase, name)[0]), place)
        return default

    def wrong(self, name, message):
        """Return the error for a setting, with its place and its value, but no password in it."""
        text, place = self.find(name)
        text = re.sub(r"\S*@", "...@", text)
        return SettingsError("%s: %.200r %s" % (name, text, message), place)

    def warn_of_misspelt(self):
        prefix = self.rcbase + "." if self.rcbase else ""
        for key in self.settings.keys():
            name = key[len(prefix):] if key.startswith(prefix) else ""
            meant = difflib.get_close_matches(name, SETTINGS, 1, 0.85) if name else []
            if meant and meant[0] != name:
                log.warning("%s: %s is no setting of this program and is ignored; is %s meant?",
                            self.settings.place(key), key, meant[0])


################ Workflows ################

STREAM_RANK = {"RPRO": 3, "OFFL": 2, "NRTI": 1}


def query_of(options):
    """Return the Query that the settings ask for; raise SettingsError with the place."""
    start, end, url, api, collection, box = map(options.get, (
        "timerange.start", "timerange.end", "url", "api", "collection", "area"))
    if end < start:
        raise options.wrong("timerange.end", "is before timerange.start, %s" % start)
    try:
        if api == "auto":
            api_of(url)
    except ValueError as error:
        raise options.wrong("url", error) from None
    producttype = options.get("producttype", required=collection == S5P)
    if collection == S5P and len(producttype) != 10:
        raise options.wrong("producttype", "has %d characters, a Sentinel-5P type has 10; is %s "
                            "meant?" % (len(producttype), meant_type(producttype)))
    usual = "local" if collection == S5P else "server"
    server = (options.get("area.filter") or usual) == "server"
    drawn = has_footprint(collection, producttype)
    needed = drawn and box is not None or bool(options.get("output.geojson"))
    return Query(url, collection, producttype, start, end, box, api, server and drawn, needed)


def meant_type(text):
    """Return the product type that an unpadded name may mean, such as NO2 or L2__NO2."""
    kind = re.sub(r"^L2_+", "", text.upper()).strip("_")
    level = "" if kind.startswith(("L1B_", "L2B_", "AUX_")) else "L2__"
    padded = level + kind.ljust(10 - len(level), "_")
    return padded if len(padded) == 10 else "a type such as L2__NO2___"


def sieve(items, name, reason, level=logging.INFO):
    """Yield the items for which reason(item) is empty; log how many, and why not the others."""
    kept, dropped = 0, collections.Counter()
    for item in items:
        why = reason(item)
        if why:
            dropped[why] += 1
        else:
            kept += 1
            yield item
    reasons = ", ".join("%d %s" % (count, why) for why, count in dropped.items())
    log.log(level, "%s: %d kept, %d dropped%s", name, kept, sum(dropped.values()),
            reasons and " (%s)" % reasons)


def in_period(products, query):
    """Yield the products measured within the period, ends included; one rule for all services."""
    return sieve(products, "period", lambda product: (
        "" if product.start <= query.end and product.end >= query.start else
        "measured before or after"), logging.DEBUG)


def in_area(products, query, minimum):
    """Yield (product, covered fraction of the area or None) for those that overlap the area."""
    if query.box is None or not has_footprint(query.collection, query.producttype):
        yield from ((product, None) for product in products)
        return

    def reason(found):
        _, overlaps, fraction = found
        if not overlaps:
            return "outside"
        few = fraction is not None and 100 * fraction < minimum
        return "cover less than area.minimum, %g per cent" % minimum if few else ""

    unknown = 0
    found = ((product, *box_overlap(product.geometry, query.box)) for product in products)
    for product, _, fraction in sieve(found, "area", reason):
        unknown += fraction is None
        yield product, fraction
    if unknown:
        log.warning("footprints: %d missing or not readable; these products count as overlapping",
                    unknown)


def selected(pairs, options):
    """Yield the (row, product) pairs whose row meets the condition `selection`."""
    condition = options.get("selection")

    def reason(pair):
        try:
            keep = evaluate(condition, pair[0]._asdict())
        except ValueError as error:
            raise options.wrong("selection", "fails: %s; columns are %s, written %%{orbit}" % (
                error, " ".join(Row._fields))) from None
        if not isinstance(keep, bool):
            raise options.wrong("selection", "gives %r, which is no condition; note that != is "
                                "written \\!= in a settings file" % (keep,))
        return "" if keep else "not selected"

    return sieve(pairs, "selection", reason) if condition else pairs


def best_rows(rows):
    """Return one row per orbit, or per granule where only granules are there.

    RPRO over OFFL over NRTI, then the highest collection, processor version, production time: the
    rule of CSO's own tables.  Rows without an orbit in their name are all kept.
    """
    taken = set()

    def merit(row):
        return (STREAM_RANK.get(row.processing, 0), row.collection, row.processor_version,
                parse_name(row.filename).get("production", ""), row.filename, row.product_id)

    def reason(row):
        orbit = row.producttype, parse_name(row.filename).get("orbit", "")
        granule = orbit + (row.start_time,) if row.processing == "NRTI" else orbit
        if orbit[1] and (orbit in taken or granule in taken):
            log.debug("best: dropped %s", row.filename)
            return " ".join(filter(None, (row.processing, row.collection, row.processor_version)))
        taken.add(granule)
        return ""

    return list(sieve(sorted(rows, key=merit, reverse=True), "best", reason))


def session_of(options):
    """Return the Session that the settings ask for."""
    retry = Retry(*map(options.get, (
        "download.maxtry", "download.nsec_wait", "download.nsec_wait_max")))
    return Session(options.get("timeout"), retry, *map(options.get, (
        "trusted_hosts", "token_url", "download.connections")))


def list_rows(options, session):
    """Return the rows of an inquiry, newest first, and their geometries: {product_id: JSON text}.

    The geometries only where output.geojson asks for them.
    """
    options.warn_of_misspelt()
    query, template = query_of(options), options.get("download_url")
    minimum, best, geojson = map(options.get, ("area.minimum", "best", "output.geojson"))
    found = in_area(in_period(search(query, session), query), query, minimum)
    pairs = ((row_of(product, template, fraction), product) for product, fraction in found)
    rows, geometries = [], {}
    for row, product in selected(pairs, options):
        rows.append(row)
        if geojson:         # kept as text: decoded, the points would take five times the memory
            geometries[row.product_id] = json.dumps(split_geometry(product.geometry))
    if not rows:
        log.warning("nothing found: %s %s, %s to %s, area %s; see %s", query.collection,
                    query.producttype, query.start, query.end,
                    ",".join("%g" % edge for edge in query.box or ()) or "globe", shown(query.url))
    return newest_first(best_rows(rows) if best else rows), geometries


def inquire(settings, rcbase="", session=None, today=None):
    """Write the table that the settings ask for and return its rows, newest first.

    The table is complete, or an error is raised and an older table stays as it was.  `today`, UTC
    now by default, fills in the %Y-%m-%d of output.file.
    """
    options = Options(settings, rcbase)
    today = today or datetime.datetime.now(datetime.timezone.utc)
    path, geojson = (expand_time(options.get("output." + name), today)
                     for name in ("file", "geojson"))
    columns, dmode = options.get("output.columns"), options.get("dmode")
    if os.path.abspath(geojson) == os.path.abspath(path):
        raise options.wrong("output.geojson", "is the table, output.file; expected another file")
    rows, geometries = list_rows(options, session or session_of(options))
    write_table(rows, path, columns, dmode)
    log.info("%s: %d products", path, len(rows))
    if geojson:
        write_geojson(rows, geometries, geojson, dmode)
    return rows


def tasks_of(rows, directory=".", part=None):
    """Return the Task of every row, in directory, where %Y and %{processing} etc. are filled in.

    `part` is "I/N": every N-th row only, I modulo N, so that arrays may count from 0 or from 1.
    A file name that stands in the table twice is fetched once, from its first row.
    """
    try:
        folder_template(directory)
    except ValueError as error:
        raise SettingsError("%r %s" % (directory, error)) from None
    tasks = {}
    for row in part_of(list(rows), part):
        zipped = is_directory_product(row.filename)
        try:
            name = safe_name(row.filename) + ".zip" * zipped
            path = os.path.join(fill_in(directory, row), name)
        except ValueError as error:
            raise TableError("row of %r: %s" % (row.filename[:200], error)) from None
        known = () if zipped else (int(row.size or 0), row.md5)
        if tasks.setdefault(path, Task(row.href, path, *known)).href != row.href:
            log.warning("%s: twice in the table; %s is not fetched", name, row.href)
    return list(tasks.values())


def fill_in(directory, row):
    """Return the directory of a row: %{column} by its value, %Y etc. by its start time."""
    def value(match):
        return safe_name(getattr(row, match.group(1)) or "unknown")

    directory = re.sub(r"%\{(\w+)\}", value, directory)
    if not re.search("%[YmdHMSjy]", directory):
        return directory
    if not row.start_time:
        raise ValueError("no start_time, which %%Y etc. in %r need" % directory)
    return expand_time(directory, parse_time(row.start_time.replace(" ", "T")))


def part_of(items, part):
    """Return every N-th item for "I/N", all for None; raise SettingsError."""
    if part is None:
        return items
    match = re.match(r"(\d+)/([1-9]\d*)$", part)
    if not match:
        raise SettingsError("%r is not I/N; expected numbers such as 3/16" % part)
    index, count = int(match.group(1)), int(match.group(2))
    return items[index % count::count]


################ Original names ################

# The names of the CSO toolbox, CamelCase as there.  No logic here: each translates its arguments
# for the functions above.  RcFile and UtopyaRc are in use by other tools as base classes.


class RcFile:
    """The values of a settings file; `filename` is its name.  Raises SettingsError."""

    def __init__(self, filename, env={}):       # env is read, never changed
        self.filename, self.settings = filename, read_settings(filename, env)

    def keys(self):
        """Return the list of all keys."""
        return self.settings.keys()

    def has_key(self, key):
        """Return whether the file defines a key."""
        return key in self.settings

    def get(self, key, totype='', default=None):
        """Return a value as text, or as the type named by totype, such as "int" or "datetime"."""
        return self.settings.get(key, totype, default)


class UtopyaRc:
    """Settings below a base name, for classes that are configured by a settings file.

    Subclasses call GetSetting("name"), which looks for BASE.name, then "*.name" with ever shorter
    bases.  Without rcfile nothing is read until InitRc.
    """

    def __init__(self, rcfile=None, rcbase='', env={}):
        self.logger = log
        self.rcf = self.rcfile = self.rcbase = None
        if rcfile is not None:
            self.InitRc(rcfile, rcbase, env)

    def InitRc(self, rcfile, rcbase='', env={}):
        """Read the settings file."""
        self.rcfile, self.rcbase = rcfile, rcbase
        self.rcf = RcFile(rcfile, env)

    def GetSetting(self, name, totype='', **kwargs):
        """Return a setting; `default` is returned as it is where the file has none."""
        if self.rcf is None:
            raise SettingsError("setting %r: no settings file is read yet; call InitRc" % name)
        for key in candidates(self.rcbase, name):
            if self.rcf.has_key(key):       # of rcf by its own methods: a subclass may replace it
                return self.rcf.get(key, totype, **kwargs)
        if "default" in kwargs:
            return kwargs["default"]
        raise SettingsError("setting %r is not there; expected one of the keys %s" % (
            name, ", ".join(candidates(self.rcbase, name))), self.rcfile)

    def WriteSettings(self, filename):
        """Write all values, variables filled in."""
        if self.rcf is None:
            raise SettingsError("%s: no settings file is read yet; call InitRc" % filename)
        write_settings(self.rcf.settings, filename)


class NullAuth:
    """Keeps requests from replacing a bearer header by netrc: requests.get(url, auth=NullAuth()).

    A callable that returns its argument, which is all that requests asks of an auth object.
    Nothing in this module needs it.
    """

    def __call__(self, request):
        return request


class CSO_DataSpace_Inquire(UtopyaRc):
    """Do the inquiry of a settings file when made; the table is complete, or an error is raised.

    Afterwards `rows` holds the listed Row tuples.  `indent` goes before each message.
    """

    def __init__(self, rcfile, rcbase='', env={}, indent=''):       # env is read, never changed
        UtopyaRc.__init__(self, rcfile, rcbase, env)
        log.info("%sinquire, settings %s", indent, rcfile)
        self.rows = inquire(self.rcf.settings, rcbase)


class CSO_DataSpace_Downloader:
    """Fetches files with an access token that is kept and used until it expires.

    May be pickled (without its token), so that process pools can use it.
    """

    def __init__(self):
        self.__setstate__({"session": Session()})

    def __setstate__(self, state):
        self.session = state["session"]
        weakref.finalize(self, self.session.__exit__)       # gives the session back

    def CreateToken(self, href, indent=''):
        """Get an access token for the host of a download url now; raise LoginError or HttpError."""
        log.info("%saccess token for %s", indent, shown(href))
        self.session.login(href)

    def DownloadFile(self, href, output_file, maxtry=10, nsec_wait=5, nsec_wait_max=600,
                     dmode=None, indent=''):
        """Bring the file at href to output_file: complete and checked, or an error is raised.

        Waits nsec_wait seconds before the second try, longer each time up to nsec_wait_max, at
        most maxtry tries in all.  Makes the directory where it is missing, with mode dmode.
        """
        try:
            mode = directory_mode(dmode)
        except ValueError as error:
            raise SettingsError("dmode: %r %s" % (dmode, error)) from None
        outcome = fetch(Task(href, os.fspath(output_file)), self.session,
                        Retry(maxtry, nsec_wait, nsec_wait_max), mode)
        log.info("%s%s: %s", indent, outcome.filename, outcome.state)


################ Command line ################


class Screen(logging.Handler):
    """What the user sees on stderr: messages, and on a terminal one line of progress below them."""

    def __init__(self, stream, quiet=False, clock=time.monotonic):
        super().__init__(logging.ERROR if quiet else logging.DEBUG)
        self.stream, self.clock = stream, clock
        self.terminal = stream.isatty() and not quiet
        self.drawn, self.drawn_at = "", -math.inf

    def emit(self, record):
        level = "" if record.levelno == logging.INFO else record.levelname.lower() + ": "
        self.write(printable(level + record.getMessage()) + "\n")

    def write(self, text, drawn=""):
        """Write a text in the place of the line of progress; `drawn` is what is to stay below."""
        with self.lock, contextlib.suppress(OSError, ValueError):   # a terminal that went away
            erasing = "\r" + " " * len(self.drawn) + "\r" if self.drawn else ""
            self.drawn = drawn
            self.stream.write(erasing + text + drawn)
            self.stream.flush()

    def draw(self, text):
        """Show the line of progress: cut to the window, at most ten times a second."""
        if self.terminal and self.clock() - self.drawn_at >= 0.1:
            self.write("", text[:self.width() - 1])
            self.drawn_at = self.clock()

    def width(self):
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


class Progress:
    """Adds up the files and bytes of a batch and shows them on a Screen."""

    def __init__(self, tasks, screen, clock=time.monotonic):
        self.files = len(tasks)
        self.size = sum(task.size for task in tasks) if all(task.size for task in tasks) else 0
        self.screen, self.clock, self.began = screen, clock, clock()
        self.ended = self.came = self.skipped = 0
        self.lock = threading.Lock()

    def add(self, count):
        with self.lock:
            self.came += count

    def draw(self):
        rate = self.came / max(self.clock() - self.began, 0.001)
        left = self.size - self.came - self.skipped
        self.screen.draw("%d/%d files, %s%s, %s/s%s" % (
            self.ended, self.files, bytes_text(self.came),
            " of " + bytes_text(self.size) if self.size else "", bytes_text(rate),
            ", %s left" % duration(left / rate) if rate and left > 0 else ""))

    def end(self, outcome, size=0):
        """Log how a file ended; on a terminal only what needs attention stays to be read."""
        name, state, came, seconds, message = outcome
        self.ended += 1
        self.skipped += 0 if came else size
        if state == "failed":
            log.error("%s", message if name in message else "%s: %s" % (name, message))
            return
        speed = ", %s in %.1f s, %s/s" % (
            bytes_text(came), seconds, bytes_text(came / max(seconds, 0.001)))
        quiet = self.screen.terminal and state in ("verified", "size only", "present")
        log.log(logging.DEBUG if quiet else logging.INFO, "%s: %s%s", name, state,
                speed if came else "")


def duration(seconds):
    """Return seconds for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return "%d s" % seconds
    hours, minutes = divmod(int(seconds) // 60, 60)
    return "%d h %d min" % (hours, minutes) if hours else "%d min" % minutes


def printable(text, encoding="utf-8"):
    """Return the text with all escaped that a file of this encoding or a terminal can't show."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match.group())[1:-1], text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text):
    """Print a result."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"      # it may be closed
    print(printable(text, encoding), flush=True)    # now, so that a reader who left is noticed here


def parser():
    top = argparse.ArgumentParser(
        prog="cso_dataspace", description="List and fetch Sentinel products of the Copernicus "
        "Data Space.", epilog="exit status: 0 all well, 1 error, 2 usage, 3 some files failed, "
        "130 and 143 stopped by a signal")
    top.add_argument("--version", action="version", version="cso_dataspace " + __version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True

    def command(name, text, example="no2.rc"):
        sub = commands.add_parser(name, help=text, description=text.capitalize() + ".",
                                  epilog="example: %(prog)s " + example)
        sub.add_argument("-q", "--quiet", action="store_true", help="errors only")
        sub.add_argument("-v", "--verbose", action="store_true", help="requests and dropped rows")
        return sub

    run = command("run", "inquire, write the table, download its files",
                  "no2.rc --set area=-10,35,30,60")
    listing = command("inquire", "write the table only", "no2.rc --env my.work=/scratch/me")
    fetching = command("download", "download the files of a table, or single ones",
                       "table.csv --dir data/%%Y/%%m --part 3/16 --report report.csv")
    showing = command("settings", "show the evaluated settings, each with its place")
    checking = command("check", "see whether everything is in place")
    for sub in (run, listing, showing, checking):
        sub.add_argument("rcfile", metavar="RCFILE", nargs="?" if sub is checking else None,
                         help="settings file")
        sub.add_argument("--rcbase", metavar="BASE", help="first part of the names of the settings")
        sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], type=pair,
                         help="another value for a setting")
        sub.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], type=pair,
                         help="a value for ${NAME}")
    fetching.add_argument("sources", metavar="TABLE|HREF", nargs="+")
    fetching.add_argument("--dir", default=".", help="where to; %%Y, %%{processing} etc. filled in")
    fetching.add_argument("--connections", type=int, default=4, choices=range(1, 21), metavar="N",
                          help="transfers at once; 4 are allowed, 20 to some accounts")
    for sub in (run, fetching):
        sub.add_argument("--part", metavar="I/N", type=share,
                         help="every N-th file only, for job arrays")
        sub.add_argument("--report", metavar="FILE", help="write a csv line for each file")
    for sub in (run, listing, fetching):
        sub.add_argument("--dry-run", action="store_true", help="show what would be done")
    return top


def share(text):
    try:
        part_of([], text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def pair(text):
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError("%r is not NAME=VALUE" % text)
    return name, value


def options_of(args):
    """Return the Options of a command line: its settings file, base and overrides."""
    settings = read_settings(args.rcfile, dict(args.env))
    base = args.rcbase
    if base is None:
        ending = ".timerange.start"
        bases = sorted(key[:-len(ending)] for key in settings.keys()
                       if key.endswith(ending) and not key.startswith("*"))
        if len(bases) > 1:
            raise SettingsError("several inquiries in it; choose one: --rcbase %s"
                                % " or ".join(bases), args.rcfile)
        base = bases[0] if bases else ""
    for name, value in args.set:
        key = candidates(base, name)[0] if name in SETTINGS else name
        settings.set(key, value, "--set " + name)
    return Options(settings, base)


def command_run(args, screen):
    options = options_of(args)
    query_of(options)
    given = {name: options.get(name) for name in SETTINGS}      # a mistake is told before all else
    directory, url = given["download.dir"], given["download_url"]
    with session_of(options) as session:
        if args.dry_run:
            return dry_run(options, session, directory, args.part)
        if may_see_token(url, session.http.trusted):            # a wrong password too
            session.login(url)
        rows = inquire(options.settings, options.rcbase, session)
        return fetch_all(tasks_of(rows, directory, args.part), session, args.report, screen,
                         given["dmode"])


def command_inquire(args, screen):
    options = options_of(args)
    with session_of(options) as session:
        if args.dry_run:
            return dry_run(options, session)
        inquire(options.settings, options.rcbase, session)
    return 0


def command_download(args, screen):
    with Session(connections=args.connections) as session:
        rows = [row for source in args.sources for row in rows_of(source, session)]
        tasks = tasks_of(rows, args.dir, args.part)
        if args.dry_run:
            return show_plan(tasks)
        return fetch_all(tasks, session, args.report, screen)


def rows_of(source, session):
    """Return the rows of a table, or the one row of a href, named by the catalogue."""
    if not re.match(r"(https?|s3)://", source):
        return read_table(source)
    href = mend_href(source)
    url = DOWNLOAD_URL if href.startswith("s3://") else href
    return [row_of(looked_up(href, session), url)]


def dry_run(options, session, directory=".", part=None):
    session.note = lambda request: say("request: %s%s" % (
        urllib.parse.unquote(request.url), " " + json.dumps(request.body) if request.body else ""))
    return show_plan(tasks_of(list_rows(options, session)[0], directory, part))


def show_plan(tasks):
    unknown = sum(not task.size for task in tasks)
    say("%d files, %s%s" % (len(tasks), bytes_text(sum(task.size for task in tasks)),
                            ", and %d of unknown size" % unknown if unknown else ""))
    for task in tasks:
        say("%s <- %s" % (task.path, task.href))
    return 0


def fetch_all(tasks, session, report, screen, dmode=None):
    """Download the tasks, show and report how each ended; return the exit status."""
    progress = Progress(tasks, screen)
    sizes = {os.path.basename(task.path): task.size for task in tasks}
    outcomes = {name: Outcome(name, "failed", message="not reached") for name in sizes}
    write_report(report, outcomes)              # fails now, not after a night of downloads
    try:
        for outcome in download(tasks, session, dmode, progress.add, progress.draw):
            outcomes[outcome.filename] = outcome
            progress.end(outcome, sizes[outcome.filename])
    except BaseException:
        with contextlib.suppress(FileError):    # what ended the run is told, not this
            write_report(report, outcomes)
        raise
    screen.write("")
    write_report(report, outcomes)
    counts = collections.Counter(outcome.state for outcome in outcomes.values())
    said = ", ".join("%d %s" % (count, state) for state, count in sorted(counts.items()))
    say("%d of %d files here: %s" % (len(outcomes) - counts["failed"], len(outcomes),
                                     said or "nothing to do"))
    if counts["failed"]:
        log.error("%d files failed; run the same command again to go on", counts["failed"])
    return 3 if counts["failed"] else 0


def write_report(path, outcomes):
    """Write a csv line for each file; those that a stop left out are failed as well."""
    if path:
        write_csv(path, Outcome._fields, (
            outcome._replace(seconds="%.1f" % outcome.seconds, message=printable(outcome.message))
            for outcome in outcomes.values()))


def command_settings(args, screen):
    settings = options_of(args).settings
    for key in settings.keys():
        say("%s : %s   ! %s" % (key, settings.get(key, "str"), settings.place(key)))
    return 0


def command_check(args, screen):
    """Print a line for everything a run needs: ok, or what to do; status 1 if something is not."""
    session, url, folder, failed = Session(), CATALOGUE_URL + "/odata/v1", ".", 0
    if args.rcfile:
        options = options_of(args)
        session, url = session_of(options), query_of(options).url.rstrip("/")
        with contextlib.suppress(SettingsError):
            folder = options.get("download.dir")
    session.retry = Retry(1)
    with session:
        for name, probe in (
                ("python", check_python),
                ("proxy", lambda: "ok: " + (proxy_of(url) or "none for " + host_of(url))),
                ("catalogue", lambda: check_catalogue(url, session)),
                ("opensearch", lambda: check_opensearch(url, session)),
                ("credentials", lambda: check_credentials(session)),
                ("login", lambda: session.token.get() and "ok: the service gave a token"),
                ("space", lambda: check_folder(folder))):
            try:
                said = probe()
            except (DataSpaceError, OSError, ValueError) as error:
                said, failed = "NOT ok: %s" % error, 1
            say("%-12s %s" % (name, said))
    return failed


def check_python():
    paths = ssl.get_default_verify_paths()
    return "ok: %d.%d.%d, %s, certificates from %s" % (
        sys.version_info[:3] + (ssl.OPENSSL_VERSION, os.environ.get("SSL_CERT_FILE")
                                or paths.cafile or paths.capath or "elsewhere"))


def check_catalogue(url, session):
    """Ask for the least there is; tell how far the clocks are apart."""
    base = api_of(url) == "opensearch" and odata_beside(url) or url
    date = asked(base, session)
    skew = abs(email.utils.mktime_tz(date) - time.time()) if date else 0
    return "ok: %s answers, clocks differ by %d s" % (base, skew)


def check_opensearch(url, session):
    meant = api_of(url) == "opensearch"
    base = url if meant else "%s://%s/resto/api" % split_url(url)[:2]
    try:
        asked(base, session)
    except HttpError as error:
        if meant and not odata_beside(url):
            raise
        return "ok: not needed; retired in March 2026 (%s)" % error
    return "ok: %s answers" % base


def asked(base, session):
    """Return the parsed Date header of the smallest page of a catalogue; raise HttpError."""
    probe = {"odata": "/Products?$top=1&$select=Id", "stac": "/collections?limit=1",
             "opensearch": "/collections/Sentinel5P/search.json?maxRecords=1"}[api_of(base)]
    with session.http.open(base + probe, {"Accept": "application/json"}) as response:
        decode_json(session.read(response, base), base)
        return email.utils.parsedate_tz(response.headers.get("Date") or "")


def check_credentials(session):
    found = find_credentials("download." + DOMAIN, session.environ)
    path = netrc_path(session.environ)
    mode = ", mode %03o" % stat.S_IMODE(os.stat(path).st_mode) if path in found.source else ""
    return "ok: %s, from %s%s" % (found.username, found.source, mode)


def check_folder(folder):
    place = existing_directory(re.split("%", folder)[0] or ".")
    if not os.access(place, os.W_OK):
        raise FileError("%s: can't be written; choose another download.dir" % place)
    return "ok: %s free in %s" % (bytes_text(shutil.disk_usage(place).free), place)


COMMANDS = {"run": command_run, "inquire": command_inquire, "download": command_download,
            "settings": command_settings, "check": command_check}
STOPS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def stop(number, frame):
    """End the run at a signal.  Those that a launcher of jobs sends on as well change nothing."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def drain(stream):
    """Flush what is left; if its reader has gone, let Python not stumble over that at exit."""
    try:
        if stream:
            stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv=None):
    """Run the command line and return the exit status: 0, 1, 2, 3, 130 or 143.

    No traceback for what a user can cause.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(drain, sys.stdout)
        undo.callback(drain, sys.stderr)
        try:
            args = parser().parse_args(argv)
        except SystemExit as error:         # argparse has said why
            return error.code or 0
        screen = Screen(sys.stderr or undo.enter_context(open(os.devnull, "w")), args.quiet)
        undo.callback(log.setLevel, log.level)
        undo.callback(setattr, log, "propagate", log.propagate)
        undo.callback(log.removeHandler, screen)
        log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
        log.propagate = False
        log.addHandler(screen)
        handlers = undo.enter_context(contextlib.ExitStack())
        with contextlib.suppress(ValueError):       # not the main thread
            for number in STOPS:
                if signal.getsignal(number) != signal.SIG_IGN:      # as in the background
                    before = signal.signal(number, stop)
                    handlers.callback(signal.signal, number, before or signal.SIG_DFL)
        try:
            return COMMANDS[args.command](args, screen)
        except BrokenPipeError:             # stdout went to a program such as head, which ended
            return 1
        except (DataSpaceError, OSError, UnicodeError) as error:
            log.error("%s", error)
            return 1
        except SystemExit as stopped:
            handlers.pop_all()                  # the program ends: no other signal is to cut that
            log.error("stopped by %s; what has come is kept, run again to go on",
                      STOPS[stopped.code - 128])
            return stopped.code


if __name__ == "__main__":
    sys.exit(main())
