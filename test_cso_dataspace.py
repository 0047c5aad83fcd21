"""Tests of cso_dataspace, on a stand-in of the Data Space that listens on the loopback interface.

    python3 -m unittest                         all tests: no network, no account
    python3 test_cso_dataspace.py demo          the main job of example.rc on the stand-in
    python3 test_cso_dataspace.py benchmark     figures, against plain Python and curl
"""

import base64
import bisect
import collections
import collections.abc
import contextlib
import csv
import datetime
import email.utils
import errno
import faulthandler
import functools
import gc
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import operator
import os
import pathlib
import pickle
import platform
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import typing
import unittest
import urllib.parse
import urllib.request
import zipfile
import zlib
from math import asin, atan2, cos, degrees, radians, sin
from unittest import mock

import cso_dataspace as cso

# ---------------------------------------------------------------------------------------
# The stand-in: a Data Space on the loopback interface, with faults that can be switched on
# ---------------------------------------------------------------------------------------
# A record is one product of the catalogue, a request what a client asked, an answer what will be
# sent.  An endpoint is a function (space, request) -> answer.  A fault is a function (space,
# request, respond, detail) -> answer; respond() asks the endpoint, so a fault may answer itself,
# change the request before, or the answer after.  Everything is sent in one place.

MD5 = hashlib.md5                   # kept, so that a test may take it away from hashlib
HDF5, ZIP = b'\x89HDF\r\n\x1a\n', b'PK\x03\x04'
BLOCK = 1 << 16
HTML = '<!DOCTYPE html>\n<html><head><title>%s</title></head><body><h1>%s</h1></body></html>\n'
NO_TRACE = '00000000-0000-0000-0000-000000000000'


class Record(typing.NamedTuple):
    """One product; times are ISO text with six digits and Z.  The last fields make oddities."""
    id: str
    name: str
    collection: str
    producttype: str
    start: str                      # measured, as in the catalogue; the name tells other times
    end: str
    published: str
    size: int                       # as recorded; what is delivered is `content` bytes
    orbit: int
    timeliness: str = None
    geometry: object = None         # GeoJSON, None, or a function without arguments that makes it
    content: int = None             # bytes delivered; None: as the stand-in is told
    stated: int = None              # size stated instead of the true one, such as 0 or -1
    checksum: str = 'MD5'           # or '' (an empty list), or a text stated instead: 'N/A'

    @property
    def stem(self):
        return re.sub(r'\.(nc|SAFE|SEN3)$', '', self.name)

    @property
    def stream(self):
        return self.name[4:8] if self.collection == 'SENTINEL-5P' else None

    @property
    def footprint(self):
        return self.geometry() if callable(self.geometry) else self.geometry


OUTLINES = {'LineString': lambda c: [c], 'MultiLineString': list, 'Point': lambda c: [[c]],
            'Polygon': lambda c: c[:1], 'MultiPolygon': lambda c: [part[0] for part in c]}


def outlines(geometry):
    """The outlines of a GeoJSON geometry, each a list of points; none for None."""
    return OUTLINES[geometry['type']](geometry['coordinates']) if geometry else []


def bounding_box(points):
    xs, ys = zip(*(point[:2] for point in points))
    return min(xs), min(ys), max(xs), max(ys)


def meets_box(geometry, box):
    """Whether the bounding box of an outline meets the box: planar, as the service's test is."""
    return any(w <= box[2] and e >= box[0] and s <= box[3] and n >= box[1]
               for w, s, e, n in map(bounding_box, outlines(geometry)))


def typed_geometry(kind, text):
    """GeoJSON from places `x,y`; `|` begins the next part."""
    lines = [[[float(number) for number in place.split(',')] for place in part.split()]
             for part in text.split('|')]
    wrap = {'LineString': lines[0], 'MultiPolygon': [[line] for line in lines]}
    return {'type': kind, 'coordinates': wrap.get(kind, lines)}


def as_time(text):
    """A time of a query in UTC with six digits, so that times compare as text."""
    found = re.match(r'(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(?:\.(\d{1,9}))?)?'
                     r'(?:Z|([+-]\d\d):?(\d\d))?$', text)
    try:
        day, clock, second, fraction, hours, minutes = found.groups()
        moment = datetime.datetime.strptime(day + (clock or '00:00') + (second or ':00'),
                                            '%Y-%m-%d%H:%M:%S')
    except (AttributeError, ValueError):
        raise BadRequest('Invalid value: %s' % text) from None
    moment -= datetime.timedelta(hours=int(hours or 0),
                                 minutes=int((hours or '+')[0] + (minutes or '0')))
    return '%s.%sZ' % (moment.isoformat(), ((fraction or '') + '000000')[:6])


def typed_records(text):
    """Records from the block below: id, name, times and size, geometry; an empty line between."""
    for block in text.strip().split('\n\n'):
        id, name, start, end, published, size, *words = block.split()
        mission, producttype, orbit, timeliness = name[1], name[9:19], name[52:57], None
        if name.startswith('S5P'):
            mission, orbit = '5P', orbit if name[57] == '_' else 0
        else:
            producttype, orbit, timeliness, *words = words
        yield Record(id, name, 'SENTINEL-' + mission, producttype, as_time(start), as_time(end),
                     as_time(published), int(size), int(orbit),
                     None if timeliness == '-' else timeliness,
                     typed_geometry(words[0], ' '.join(words[1:])) if words != ['-'] else None)


# Real products: ids, names, times, sizes and footprints as the service gave them in 2024, the
# footprints thinned to a few points.  Id; name; start, end, published, size and, where the name
# does not tell, product type, orbit, timeliness; geometry.
RECORDS = tuple(typed_records("""
afd1aab5-3ce3-4b8f-b5f1-422f0c0614e8
S5P_RPRO_L1B_RA_BD1_20180430T034250_20180430T052420_02820_03_020100_20220630T164539.nc
2018-04-30T04:04:24 2018-04-30T05:02:48 2023-03-06T16:55:41.883340 539636498
MultiPolygon 180,-83.4 127.8,-85.5 113.6,29 92.5,56.2 37.4,68.8 -83.2,83.3 -180,85.3 -180,90
180,90 180,85.3 148.7,78.6 147.6,0.9 180,-57.3 180,-83.4 | -180,-57.3 -169.3,-62.5 -139.4,-68.4
-153,-76.9 -163.2,-80.3 -180,-83.4 -180,-57.3

d1265845-c687-4afa-9ddb-616c9a720311
S5P_RPRO_L1B_RA_BD2_20180430T153321_20180430T171451_02827_03_020100_20220630T164636.nc
2018-04-30T15:54:55 2018-04-30T16:53:19 2023-04-29T14:44:06.554369 3025426177
Polygon 162.6,52 180,62.3 180,90 -180,90 -180,62.3 -85.3,56.3 -64.1,29.2 -33.3,-85.3 22.4,-79.1
-20.9,-28.4 -37.1,60.6 -1.6,85.1 99.7,83.1 162.6,52

45f44456-4d78-45c3-83ea-93a97b03452a
S5P_RPRO_L1B_RA_BD3_20180430T001950_20180430T020120_02818_03_020100_20220630T164522.nc
2018-04-30T00:41:23 2018-04-30T01:33:40 2023-03-06T18:41:49.716589 2656617620
MultiPolygon -180,90 180,90 180,-40.6 155.7,44.7 114.5,67 -56.2,85.8 -132.4,85.3 -164.3,75.3
-169,53.3 -156.8,-17.3 -142.5,-45.8 -128,-83.1 -180,-85.2 -180,90 | 180,-85.2 147.7,-84.3
168.1,-79.9 173.6,-76.4 178.4,-69.3 180,-62.5 180,-85.2

53c08b46-e19b-4321-abc6-3b7706f904c8
S5P_RPRO_L1B_RA_BD4_20180430T185621_20180430T203752_02829_03_020100_20220630T164651.nc
2018-04-30T19:17:56 2018-04-30T20:16:19 2023-03-06T17:04:44.385197 2838014283
Polygon 111.2,51.7 180,68.7 180,90 -180,90 -180,68.7 -136.3,56.8 -114.8,29.7 -83.5,-84.9 -29,-79
-72.7,-26.2 -87.9,61 -48.8,85.5 51.2,82.8 111.2,51.7

c68afb60-e42e-408f-9d89-118675b2a768
S5P_RPRO_L1B_RA_BD5_20180430T135151_20180430T153321_02826_03_020100_20220630T164628.nc
2018-04-30T14:13:25 2018-04-30T15:11:49 2023-04-28T00:53:12.235280 2831035678
Polygon -172.8,51.8 -110.9,69.1 -62.3,58.2 -33.8,16.9 -6.1,-85 47.3,-79 0.2,-17.1 0.5,80.8
126.7,82.8 180,53.7 180,90 -180,90 -180,53.7 -172.8,51.8

a66bf505-4492-4e22-84e2-1ab42c4697a2
S5P_NRTI_L1B_RA_BD5_20240229T222242_20240229T222754_33064_03_020100_20240301T001557.nc
2024-02-29T22:21:43 2024-02-29T22:28:53 2024-03-01T00:27:40.940972 693372266
MultiPolygon 180,60.6 179,61.1 176.6,62 178.1,63.2 179,63.9 180,64.5 180,60.6 | -180,64.5
-145.6,72.9 -121.4,72.1 -124.2,54.4 -162.3,47.5 -180,60.6 -180,64.5

b6116841-8681-49a0-9b36-e1a97dac043f
S5P_RPRO_L1B_RA_BD6_20180430T203752_20180430T221922_02830_03_020100_20220630T164659.nc
2018-04-30T20:59:26 2018-04-30T21:57:50 2023-04-27T21:06:47.968872 2891258467
Polygon 85.7,51.8 141.9,69 180,64.9 180,90 -180,90 -180,64.9 -136.5,20.6 -107.7,-84.9 -54.6,-79
-97.3,-27.9 -113.4,57.3 -95.7,82.6 25.5,82.7 85.7,51.8

23b3053d-bfa3-4fbc-bfc2-18041ffc1ef1
S5P_RPRO_L1B_RA_BD7_20180430T052420_20180430T070550_02821_03_020100_20220630T164547.nc
2018-04-30T05:45:55 2018-04-30T06:44:18 2023-05-08T19:30:40.642180 1639821037
MultiPolygon 180,-77.5 104.1,-59.8 88.4,29.2 11.8,68.9 -87.3,59.6 -106.7,83.3 -180,86.5 -180,90
180,90 180,86.5 114.7,58.7 131.1,-28.5 180,-66.7 180,-77.5 | -180,-66.7 -175.2,-67.5
-165.2,-68.6 -169.7,-72.2 -174.2,-74.9 -180,-77.5 -180,-66.7

2b5f9e00-db1f-45bb-9571-c493754e29ad
S5P_RPRO_L1B_RA_BD8_20180430T034250_20180430T052420_02820_03_020100_20220630T164539.nc
2018-04-30T04:04:24 2018-04-30T05:02:48 2023-03-06T18:31:45.533781 1663855224
MultiPolygon 180,-83.3 129.7,-56.2 117.9,18.2 87.8,59.2 -19.8,52.1 -81.4,83.3 -180,85.6 -180,90
180,90 180,85.6 140,56.8 152.4,-17.6 180,-57.7 180,-83.3 | -180,-57.7 -169.7,-62.6 -139.8,-68.6
-150.4,-75.7 -161.5,-79.8 -180,-83.3 -180,-57.7

602698a4-18b0-5c7c-8839-34a9ac8e3e1b
S5P_OFFL_L1B_IR_SIR_20180430T001950_20180430T020120_02818_01_010000_20180430T035011.nc
2018-04-30T01:34:19 2018-04-30T01:37:29 2019-03-15T16:33:35.440377 0
-

7ba0ab22-e9be-58b6-8053-9be2f383d4d7
S5P_OFFL_L1B_IR_UVN_20180501T014222_20180501T032352_02833_01_010000_20180503T164434.nc
2018-05-01T02:56:52 2018-05-01T03:00:02 2019-03-15T16:33:35.309383 0
-

434b808d-9cc2-41b5-88e1-bed7060df964
S5P_RPRO_L2__AER_AI_20180430T034151_20180430T052519_02820_01_010301_20190513T120052.nc
2018-04-30T04:04:25 2018-04-30T05:02:49 2023-05-10T12:26:24.206879 134052273
MultiPolygon 180,-83.1 129.8,-55.8 117.8,18.5 87.4,59.5 -20.2,51.9 -81.1,82.9 -180,85.5 -180,90
180,90 180,85.5 145,75.4 147.4,1.3 180,-57.4 180,-83.1 | -180,-57.4 -170.1,-62.3 -140.6,-68.4
-152,-76.1 -159.7,-79.1 -180,-83.1 -180,-57.4

d5dd15c9-d59a-4281-ae0d-4bfd1b3eb33e
S5P_NRTI_L2__AER_AI_20231022T103208_20231022T103708_31213_03_020500_20231022T113730.nc
2023-10-22T10:32:02 2023-10-22T10:37:15 2023-10-22T11:47:29.777094 21812079
Polygon 31.2,-68.1 22,-79.1 -2,-84.5 48.4,-85.5 95.2,-81.9 123.8,-68.5 86.1,-59.1 65.5,-64.4
31.2,-68.1

a2019099-6c0d-4da8-8405-749ae59c133e
S5P_RPRO_L2__AER_LH_20180430T171451_20180430T185621_02828_03_020400_20221125T084638.nc
2018-04-30T17:36:26 2018-04-30T18:34:49 2023-04-26T18:37:22.672282 66144140
Polygon 136.5,51.8 180,68.3 180,90 -180,90 -180,68.3 -118.5,61.1 -85.7,20.6 -56.9,-84.9
-19.1,-59.6 -49.9,-18.9 -62.5,49.9 -45,82.5 76.2,82.8 136.5,51.8

86827617-dc85-49d9-a7a4-083811b5b30f
S5P_NRTI_L2__AER_LH_20240229T234748_20240229T235248_33065_03_020600_20240301T005500.nc
2024-02-29T23:47:43 2024-02-29T23:52:54 2024-03-01T01:10:16.823026 10038649
Polygon -169.7,10.6 -165.4,-7.4 -157.7,-4.7 -150,-2.9 -141.8,-2.1 -145.5,15.9 -153.8,15.5
-160,14.2 -169.7,10.6

80b31b88-3341-4582-9b1d-f75dc645da6a
S5P_RPRO_L2__CH4____20180520T123653_20180520T141823_03109_03_020400_20221108T105545.nc
2018-05-20T13:43:49 2018-05-20T13:56:51 2023-03-06T18:22:53.851810 10278238
Polygon -157.6,47.5 -110.8,68 -29.9,80.8 133.6,85 180,51.9 180,90 -180,90 -180,51.9 -157.6,47.5

88b75b4e-2a50-49d2-b9fa-0c80e60b1e2a
S5P_RPRO_L2__CH4____20180430T052420_20180430T070550_02821_03_020400_20221107T155135.nc
2018-04-30T05:45:55 2018-04-30T06:44:18 2023-05-02T17:54:20.212542 53613964
MultiPolygon 180,-77.5 104.1,-59.8 88.4,29.2 11.8,68.9 -87.3,59.6 -106.7,83.3 -180,86.5 -180,90
180,90 180,86.5 114.7,58.7 131.1,-28.5 180,-66.7 180,-77.5 | -180,-66.7 -175.2,-67.5
-165.2,-68.6 -169.7,-72.2 -174.2,-74.9 -180,-77.5 -180,-66.7

959973af-9c1b-45dd-bf81-b2a95a565db2
S5P_NRTI_L2__CLOUD__20240301T000248_20240301T000748_33065_03_020601_20240301T005636.nc
2024-03-01T00:02:42 2024-03-01T00:07:55 2024-03-01T01:10:23.895099 51568350
MultiPolygon 180,45.2 176,43.3 172.4,47.8 167.2,52.9 158.8,58.8 164.2,61.8 171.2,64.6 180,66.7
180,45.2 | -180,66.7 -159.5,68.1 -148.6,67.5 -149.6,49.7 -162.2,49.8 -180,45.2 -180,66.7

f6e4d82c-250f-45c2-9ee8-bc9fabfea279
S5P_OFFL_L2__CLOUD__20230915T132336_20230915T150505_30690_03_020500_20230917T052008.nc
2023-09-15T13:45:10 2023-09-15T14:43:34 2023-09-17T05:54:50.400021 525603414
Polygon -151.5,61.3 -86.8,67.7 -38.8,41.9 -22.1,-3.5 -19.9,-72.6 -40.7,-83.2 -180,-82.9 -180,-90
180,-90 180,-82.9 132.3,-81 44.5,-62.5 19.2,-43.4 1.6,1.7 -4.5,66.7 15.4,83.3 136.4,82 180,68.3
180,90 -180,90 -180,68.3 -151.5,61.3

3f517a1c-15d9-4283-bcec-82983ac4983e
S5P_NRTI_L2__CO_____20240102T033326_20240102T033826_32230_03_020600_20240102T052723.nc
2024-01-02T03:33:21 2024-01-02T03:38:32 2024-01-02T05:36:31.201809 18379399
Polygon 101.4,61.2 111.2,55.7 121.1,46.4 140.7,53.1 157.7,53.1 159.6,70.8 127,70.7 112.8,67.4
101.4,61.2

ac472119-a5b2-4f75-acc2-ee7f23f01410
S5P_NRTI_L2__HCHO___20240102T033326_20240102T033826_32230_03_020601_20240102T052911.nc
2024-01-02T03:33:21 2024-01-02T03:38:32 2024-01-02T05:36:38.905057 63923908
Polygon 100.9,61.5 110.9,56 120.9,46.7 144.2,53.6 157.9,53.4 160.2,71.1 126.8,70.8 113.5,67.8
100.9,61.5

5700d91c-eb14-4e71-a2f6-5200309f8b7f
S5P_RPRO_L2__HCHO___20180430T153222_20180430T171550_02827_01_010105_20190201T152558.nc
2018-04-30T15:54:56 2018-04-30T16:53:20 2023-05-10T18:10:25.034198 567996301
Polygon 162,51.8 180,62.5 180,90 -180,90 -180,62.5 -90.4,59.6 -59.8,18.7 -32.7,-85 22,-79
-21.1,-28 -37.2,60.9 1.4,85.5 101.7,82.8 162,51.8

d956beda-fa6d-482f-b01f-d20fcec165cc
S5P_NRTI_L2__NO2____20240410T222656_20240410T223156_33646_03_020600_20240410T231205.nc
2024-04-10T22:26:50 2024-04-10T22:32:02 2024-04-10T23:22:35.653011 63842550
Polygon -144.7,-29.1 -143.7,-37.8 -143.1,-47.1 -134.8,-45.7 -109.6,-40.8 -113.5,-33.9
-118.1,-23.5 -129.7,-25.4 -144.7,-29.1

e3c6ddb2-824c-4828-a636-e7c9ae4ebd17
S5P_NRTI_L2__NO2____20230701T030849_20230701T031349_29605_03_020500_20230701T050209.nc
2023-07-01T03:08:43 2023-07-01T03:13:56 2023-07-01T05:12:02.668601 62379179
MultiPolygon 180,81.5 167.6,70.2 143.1,70.6 110.1,60.8 68.9,68.9 69.4,84.4 84.6,87.7 180,88.1
180,81.5 | -180,88.1 -152.3,87.8 -139.7,86.2 -161.3,85 -170.3,83.8 -180,81.5 -180,88.1

7edf6c8b-6a71-41dc-8110-d8219740ec72
S5P_NRTI_L2__NO2____20231031T130208_20231031T130708_31342_03_020500_20231031T135601.nc
2023-10-31T13:02:03 2023-10-31T13:07:14 2023-10-31T14:05:49.574444 62543165
Polygon -5,-10.4 -3.7,-17.6 -2.1,-28.4 9.6,-25.3 24.3,-22.8 21.9,-15.6 18.9,-5 8.2,-6.3 -5,-10.4

0ef25a2f-4bf8-4249-ba3b-adba5f3f50f8
S5P_RPRO_L2__NP_BD3_20180430T001950_20180430T020120_02818_03_010300_20220803T144244.nc
2018-04-30T00:41:23 2018-04-30T01:33:40 2023-04-28T08:32:43.611086 305138967
MultiPolygon -180,90 180,90 180,-40.6 155.7,44.7 114.5,67 -56.2,85.8 -132.4,85.3 -164.3,75.3
-169,53.3 -156.8,-17.3 -142.5,-45.8 -128,-83.1 -180,-85.2 -180,90 | 180,-85.2 147.7,-84.3
168.1,-79.9 173.6,-76.4 178.4,-69.3 180,-62.5 180,-85.2

058f7c2e-4ae9-4cae-90a7-38446d10d393
S5P_RPRO_L2__NP_BD6_20180430T070550_20180430T084721_02822_03_010300_20220803T144327.nc
2018-04-30T07:27:25 2018-04-30T08:25:48 2023-04-29T02:47:12.244339 339277531
Polygon -71.2,51.9 30.9,62.3 65.9,22.3 95.5,-85.1 149.2,-79.1 105.1,-26.3 89.6,57.2 106.8,82.4
180,86.4 180,90 -180,90 -180,86.4 -132.1,82.9 -71.2,51.9

ab5153cc-8b64-4133-9b18-80e8be20d649
S5P_RPRO_L2__NP_BD7_20180430T052420_20180430T070550_02821_03_010300_20220803T144317.nc
2018-04-30T05:45:55 2018-04-30T06:44:18 2023-05-04T02:41:02.023454 163641779
MultiPolygon 180,-77.5 104.1,-59.8 88.4,29.2 11.8,68.9 -87.3,59.6 -106.7,83.3 -180,86.5 -180,90
180,90 180,86.5 114.7,58.7 131.1,-28.5 180,-66.7 180,-77.5 | -180,-66.7 -175.2,-67.5
-165.2,-68.6 -169.7,-72.2 -174.2,-74.9 -180,-77.5 -180,-66.7

12bb31aa-baf7-481a-b5d3-479efe65ad49
S5P_RPRO_L2__O3_____20180430T185522_20180430T203851_02829_01_010105_20190201T163955.nc
2018-04-30T19:17:57 2018-04-30T20:16:20 2023-05-10T11:59:20.685076 258732578
Polygon 111.2,51.7 180,68.7 180,90 -180,90 -180,68.7 -144,61 -111.2,20.6 -100.4,-68.4 -29,-79
-72.7,-26.2 -87.9,61 -48.8,85.5 51.2,82.8 111.2,51.7

5a8a2125-a1e8-45a1-b060-a117e9bc52c5
S5P_NRTI_L2__O3_____20240102T051826_20240102T052326_32231_03_020601_20240102T070834.nc
2024-01-02T05:18:20 2024-01-02T05:22:56 2024-01-02T07:16:01.118109 9692795
Polygon 55.1,67.1 83.9,57 94.3,62 113.5,65.7 133.2,65.3 144.6,80.7 91.6,81 63.7,75 55.1,67.1

ffa9dc1c-fb17-4324-b616-22e8e376e788
S5P_RPRO_L2__O3_TCL_20180430T105025_20180506T131803_02867_03_020401_20230329T120928.nc
2018-04-30T10:50:25 2018-05-06T13:18:03 2023-04-29T08:41:14.124733 1072903
-

0d787d85-797a-4d53-97ba-fcd79d4b6c4d
S5P_RPRO_L2__O3_TCL_20180430T004123_20180503T123326_02843_03_020401_20230329T120919.nc
2018-04-30T00:41:23 2018-05-03T12:33:26 2023-05-18T20:04:24.468934 1051288
-

bea45860-9aec-4ddc-a2fd-2a370c1f5977
S5P_NRTI_L2__O3_TCL_20240917T000000_20240918T000000_00000_03_000000_20240919T000001.nc
2024-09-14T23:55:12 2024-09-18T22:30:24 2024-09-19T01:22:37.719533 1285935
-

fad9e7de-1f57-4e9a-934f-33ac23bd9c74
S5P_RPRO_L2__O3__PR_20180430T070550_20180430T084721_02822_03_020400_20230222T152857.nc
2018-04-30T07:27:27 2018-04-30T08:25:46 2023-05-10T16:26:14.390615 305361509
Polygon -70.4,52.1 31.2,61.8 65.7,21.8 78.2,-61.7 138.4,-81.9 105.2,-26.7 89.7,56.8 105.7,82
180,86.3 180,90 -180,90 -180,86.3 -133.9,83.2 -70.4,52.1

c4d74903-1a98-4427-9f57-6fce322388fc
S5P_NRTI_L2__O3__PR_20230824T225449_20230824T225949_30383_03_020500_20230825T011733.nc
2023-08-24T22:54:45 2023-08-24T22:59:55 2023-08-25T01:34:53.165237 23448773
Polygon -159,21.2 -153.8,3.3 -146.2,6.5 -138.9,8.2 -129.8,8.8 -132.9,26.7 -143.6,26.5
-149.9,25.1 -159,21.2

42a28050-0928-4236-a589-0afb01dc933a
S5P_OFFL_L2__SO2____20230722T053338_20230722T071508_29905_03_020500_20230724T095641.nc
2023-07-22T05:55:13 2023-07-22T06:53:36 2023-07-24T10:29:24.419116 1071805746
Polygon -51.5,47.5 -20.7,65.3 52.5,63 96.2,-1.2 100.7,-69 135.7,-40 116,25.8 121.9,78.8 180,86.4
180,90 -180,90 -180,86.4 -95.6,77.2 -51.5,47.5

34dbef41-6018-4253-994e-1fd8dcd612f6
S5P_NRTI_L2__SO2____20230722T164402_20230722T164902_29911_03_020500_20230722T183719.nc
2023-07-22T16:43:56 2023-07-22T16:49:09 2023-07-22T18:46:20.160840 118840499
Polygon -111.7,66.3 -97.3,62.1 -82.9,53.7 -55.8,61.6 -38.6,61.3 -30.2,78.9 -78.9,78.8
-101.4,73.9 -111.7,66.3

76a8b976-2f2c-4792-a28c-b8a3ca329727
S5P_OPER_AUX_CTMANA_20231024T000000_20231025T000000_20231101T133927.nc
2023-10-24T00:00:00 2023-10-25T00:00:00 2023-11-01T14:09:08.024498 1717236175
-

e143501f-b87d-4476-ba74-df5d016b6bf7
S5P_OPER_AUX_CTMANA_20231021T000000_20231022T000000_20231029T133726.nc
2023-10-21T00:00:00 2023-10-22T00:00:00 2023-10-29T13:50:01.765086 1717236175
-

afdd4d93-058f-593f-8adc-a686068a3ef3
S1A_IW_GRDH_1SSV_20151025T011820_20151025T011832_008302_00BB48_21CF.SAFE
2015-10-25T01:18:20.152112 2015-10-25T01:18:32.214951 2017-11-16T17:43:47.887000
417438825 IW_GRDH_1S 8302 Fast-24h
Polygon 70.22,21.84 67.77,22.27 67.91,23 70.37,22.57 70.22,21.84

b5b62b94-757f-5cec-91d9-f626bc2c7fe6
S1A_IW_GRDH_1SSH_20151025T013730_20151025T013755_008302_00BB4A_5603.SAFE
2015-10-25T01:37:30.708058 2015-10-25T01:37:55.706411 2017-11-16T17:44:28.215000
869499444 IW_GRDH_1S 8302 Fast-24h
Polygon 51.61,-47.99 48.4,-47.21 49.17,-45.77 52.31,-46.52 51.61,-47.99

d3eef4b8-32c6-43ba-83ee-1235a8180e52
S2A_MSIL1C_20150904T105046_N0500_R051_T31VED_20231009T083312.SAFE
2015-09-04T10:50:46.027000 2015-09-04T10:50:46.027000 2024-05-22T11:45:41.941794
67841232 S2MSI1C 1049 -
Polygon 4.41,56.75 4.79,56.74 4.84,57.56 4.77,57.44 4.7,57.3 4.62,57.16 4.54,57.01 4.47,56.87
4.41,56.75

20546e98-c5bd-465a-84c9-8ecfb951a459
S2A_MSIL1C_20150904T105046_N0500_R051_T31UGT_20231009T083312.SAFE
2015-09-04T10:50:46.027000 2015-09-04T10:50:46.027000 2024-05-22T11:50:16.753481
340476709 S2MSI1C 1049 -
Polygon 6.84,52.29 5.93,52.31 5.87,51.33 6.33,51.31 6.41,51.47 6.49,51.62 6.64,51.9 6.72,52.05
6.84,52.29

cc20d81a-58b7-4b36-9700-a34fd77e72f4
S2A_MSIL2A_20150831T111056_N0500_R137_T32WMT_20231009T205044.SAFE
2015-08-31T11:10:56.027000 2015-08-31T11:10:56.027000 2024-05-22T11:19:57.686206
873514692 S2MSI2A 992 -
Polygon 6.81,65.81 6.89,64.82 9.21,64.84 9.21,65.82 6.81,65.81

9cfe223d-9a61-5737-8bdc-483051107aaa
S3A_OL_1_EFR____20160501T023419_20160501T023719_20180207T115325_0179_003_317_2700_LR2_R_NT_002.SEN3
2016-05-01T02:34:18.569970 2016-05-01T02:37:18.569970 2018-09-28T01:04:24.163942
0 OL_1_EFR___ 1060 NT
Polygon 103.2,10.3 110.6,8.8 114.9,7.8 116.2,13.1 117.5,18.4 113,19.4 105.2,20.8 104.3,15.6
103.2,10.3

64a73f2a-6a76-50c0-831d-37b533b337b6
S3A_SR_2_WAT____20171231T233317_20180101T001838_20180126T191321_2721_026_158______MAR_O_NT_003.SEN3
2017-12-31T23:33:16.819590 2018-01-01T00:18:38.498352 2018-01-26T19:27:26.248000
57686966 SR_2_WAT___ 9756 NT
MultiLineString 1.3,-70.1 0,-69.3 | 0,-69.3 -12,-54.9 -34.1,24.9 -43.8,53.2 -63.8,73.3
-83.7,78.8 -124,81.4

4d7288ab-5f73-4dcb-a8eb-825d8efd3ecd
S6A_P4_2__LR______20240225T015518_20240225T025131_20240226T073654_3373_121_117_058_EUM__OPE_ST_F08.SEN6
2024-02-25T01:55:18.533782 2024-02-25T02:51:31.456985 2024-02-26T08:04:58.504268
12193792 P4_2__LR_____ 15247 ST
MultiPolygon 180,-65.9 173,-66.6 172.9,-65.6 180,-64.9 180,-65.9 | -180,-64.9 -159.1,-62.7
-127.6,-45.6 -139.1,-56 -158.7,-63.6 -180,-65.9 -180,-64.9

73dfcc75-50d2-4733-b619-38ea09bf42ab
S6A_P4_2__LR______20240224T153557_20240224T173235_20240224T174854_6998_121_105_053_EUM__OPE_NR_F08.SEN6
2024-02-24T15:35:57.505997 2024-02-24T17:32:35.461848 2024-02-24T18:10:54.373492
27604992 P4_2__LR_____ 15242 NR
MultiPolygon 180,61.1 170.6,63.9 141.3,65.5 141.3,66.4 170.9,64.9 180,62.1 180,61.1 | -180,62.1
-144.6,38 -107.6,-42.3 -121.1,-20.4 -145.4,37.5 -180,61.1 -180,62.1
"""))


# ---- made-up products and their content

TILT, TURN = 98.7, 25.4 / 360       # of an orbit, and of the earth below a degree along it


def place_of(u, v, node):
    """[lon, lat] u degrees along an orbit from where it crosses the equator, v to the left."""
    x, y, z = cos(radians(v)) * cos(radians(u)), cos(radians(v)) * sin(radians(u)), sin(radians(v))
    y, z = (y * cos(radians(TILT)) - z * sin(radians(TILT)),
            y * sin(radians(TILT)) + z * cos(radians(TILT)))
    lon = degrees(atan2(y, x)) + node
    return [round((lon + 180) % 360 - 180, 6), round(degrees(asin(z)), 6)]


@functools.lru_cache(maxsize=None)
def half_orbit_at_greenwich(points):
    """(longitude, latitude) around the daylight half of an orbit that crosses the equator at 0.

    1300 km to either side of the track; as in the product files the ring is not cut anywhere."""
    reach, along = (100 if points > 20 else 70), (points - 1) // 2
    arcs = [reach * (2 * k / (along - 1) - 1) for k in range(along)]
    ring = [place_of(arc, -11.7, -arc * TURN) for arc in arcs]
    ring += [place_of(arc, 11.7, -arc * TURN) for arc in reversed(arcs)]
    return ring + ring[:1]


def half_orbit(middle, points):
    """The outline of an orbit that crosses the equator at `middle`, at 13:30 local time."""
    east = 15 * (13.5 - middle.hour - middle.minute / 60 - middle.second / 3600)
    return {'type': 'Polygon', 'coordinates': [[
        [round((x + east + 180) % 360 - 180, 4), round(y, 4)]
        for x, y in half_orbit_at_greenwich(points)]]}


class MadeProducts(collections.abc.Sequence):
    """Synthetic orbits, made when they are looked at."""

    def __init__(self, count, start, step, producttype, stream, points, fields):
        self.count, self.step, self.producttype, self.stream = count, step, producttype, stream
        self.points, self.fields = points, fields
        self.start = datetime.datetime.strptime(as_time(start), '%Y-%m-%dT%H:%M:%S.%fZ')
        known = datetime.datetime(2018, 4, 30, 0, 19, 50)       # orbit 2818; 6090.3 s an orbit
        self.orbit = 2818 + round((self.start - known).total_seconds() / 6090.3)
        self.mark = zlib.crc32(repr((start, step, producttype, stream)).encode())

    def __len__(self):
        return self.count

    @functools.lru_cache(maxsize=4096)
    def __getitem__(self, n):
        if not 0 <= n < self.count:
            raise IndexError(n)

        def at(seconds):
            return self.start + datetime.timedelta(seconds=n * self.step + seconds)
        begin, orbit = at(0), (self.orbit + n) % 100000
        times = [moment.isoformat()[:19].replace('-', '').replace(':', '')
                 for moment in (begin, at(6090), at(150000 + n))]
        name = 'S5P_%s_%s_%s_%s_%05d_01_010002_%s.nc' % (
            self.stream, self.producttype, times[0], times[1], orbit, times[2])
        start, end, published = (moment.isoformat()[:19] + '.%06dZ' % moment.microsecond
                                 for moment in (at(1295), at(4799), at(153600 + n)))
        return Record('%08x-0000-4000-8000-%012x' % (self.mark, n), name, 'SENTINEL-5P',
                      self.producttype, start, end, published, 600000000 + n, orbit, geometry=(
                          functools.partial(half_orbit, at(3047), self.points)), **self.fields)


def made_products(count, start='2018-07-01T00:13:10', step_seconds=6090, producttype='L2__NO2___',
                  stream='OFFL', points=5, same_start=False, **fields):
    """A sequence of `count` synthetic orbits, one every `step_seconds`, or all at the same start.

    `start` is that of the first name; the measured time begins 1295 s later.  The outlines have
    5 points, or any odd number; `fields` are more fields of Record, such as checksum=''."""
    return MadeProducts(count, start, 0 if same_start else step_seconds, producttype, stream,
                        points, fields)


def one_day(day='2018-07-01', **fields):
    """The 14 orbits of one day; some of them see Europe."""
    return made_products(14, day + 'T00:13:10', points=41, **fields)


@functools.lru_cache(maxsize=64)
def noise_block(key, size):
    return hashlib.shake_128(key.encode()).digest(size)


def content_blocks(record, size, version=0, start=0):
    """Yield the made-up bytes of a product from `start` on: any size, little memory."""
    block = noise_block('%s#%d' % (record.id, version), min(size, BLOCK))
    first, skip = divmod(start, BLOCK)
    for number in range(first, -(-size // BLOCK)):
        signature = HDF5 if record.name.endswith('.nc') else ZIP
        head = number.to_bytes(8, 'little') if number else signature
        yield (head + block[len(head):])[skip:size - number * BLOCK]
        skip = 0


def body_of(record, size=20000, version=0):
    """The whole made-up content; `version` counts the objects that had this id before."""
    return b''.join(content_blocks(record, size, version))


@functools.lru_cache(maxsize=4096)
def md5_of(id, name, size, version):
    digest = MD5()
    for block in content_blocks(Record(id, name, *[None] * 7), size, version):
        digest.update(block)
    return digest.hexdigest()


# ---- requests and answers

class BadRequest(Exception):
    """The catalogue refuses the request with 400 and this text."""


class Refused(Exception):
    """The catalogue refuses the request with this answer."""

    def __init__(self, answer):
        Exception.__init__(self, answer)
        self.answer = answer


class Request:
    """What a client asked: `pairs` are the query, `base` is how the client calls this host."""

    def __init__(self, method, target, headers, body, base):
        self.method, self.target, self.headers, self.body = method, target, headers, body
        self.base, self.range, self.trick = base, headers.get('Range'), {}
        path, _, query = target.partition('?')
        self.path = urllib.parse.unquote(path)
        self.pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        self.query = dict(self.pairs)
        self.text = '%s?%s %s' % (self.path, urllib.parse.unquote_plus(query),
                                  body.decode('utf-8', 'replace'))
        self.kind, self.endpoint, self.names = None, not_found, ()
        for kind, methods, pattern, endpoint in ROUTES:
            found = re.match(pattern + '$', self.path)
            if found:
                self.kind, self.names = kind, found.groups()
                self.endpoint = endpoint if method in methods else not_allowed
                break

    def link(self, changes):
        """The url of this request with other values in its query."""
        new = dict(changes)
        pairs = [(name, new.pop(name, value)) for name, value in self.pairs] + list(new.items())
        return '%s%s?%s' % (self.base, self.path, urllib.parse.urlencode(pairs))


class Answer:
    """What will be sent: `blocks` of bytes that make `length` (None: not told).

    `end` says how the connection ends before its time: fin, rst, drop or a stall."""

    def __init__(self, body=b'', status=200, kind='application/json', headers=()):
        self.status, self.headers = status, dict({'Content-Type': kind}, **dict(headers))
        self.blocks, self.length, self.chunked, self.end = [body], len(body), False, None
        self.record, self.close = None, lambda: None

    @property
    def body(self):
        self.blocks = [b''.join(self.blocks)]
        return self.blocks[0]

    @body.setter
    def body(self, data):
        self.blocks, self.length = [data], len(data)

    def keep(self, count):
        """Only the first `count` bytes will be sent."""
        self.blocks = first_bytes(self.blocks, count)
        return self

    def release(self):
        """Give the session of a transfer back, once."""
        close, self.close = self.close, lambda: None
        close()


def first_bytes(blocks, count):
    for block in blocks:
        if count <= 0:
            return
        yield block[:count]
        count -= len(block)


def last_byte_apart(answer):
    """Yield the blocks of an answer, and give its session back just before the last byte: who
    has the whole file may count on a free session, unless the server is told to be slow."""
    held = b''
    for block in filter(None, answer.blocks):
        if held:
            yield held
        held = block
    yield held[:-1]
    if not answer.end:
        answer.release()
    yield held[-1:]


def json_answer(data, status=200, **headers):
    return Answer(json.dumps(data).encode(), status, headers=headers)


def html_page(title, status=200):
    return Answer((HTML % (title, title)).encode(), status, 'text/html; charset=utf-8')


def zip_problem(status, code, message, **more):
    """An error of the download service."""
    return json_answer(dict(more, code='DAT-ZIP-%d' % code, message=message), status)


def not_found(space, request):
    return json_answer({'detail': 'Not Found'}, 404)


def not_allowed(space, request):
    return Answer(status=405)


def records_of_page(space, request, condition, order, skip, most):
    """The records of a page, and how many to skip for the next one, or None."""
    trick = request.trick.get('kind')
    if trick == 'empty-page':
        return [], skip
    most = max(1, most // 2) if trick == 'short-page' else min(most, space.page_limit or most)
    first = 0 if trick == 'repeat' else skip
    found = list(itertools.islice(space.passing(condition, *order), first, first + most + 1))
    records = found[:most]
    if trick == 'repeat':
        return records, skip if request.trick.get('same_link') else skip + len(records)
    return records, skip + most if len(found) > most > 0 else None


# ---- OData

class Condition(typing.NamedTuple):
    """A test of records, and the starts between which all lie that pass it."""
    test: object
    low: str = ''
    high: str = '~'


EVERYTHING = Condition(lambda record: True)


def all_of(needs):
    return Condition(lambda record: all(need.test(record) for need in needs),
                     max(need.low for need in needs), min(need.high for need in needs))


def any_of(options):
    return Condition(lambda record: any(option.test(record) for option in options),
                     min(o.low for o in options), max(o.high for o in options))


COMPARE = {'eq': operator.eq, 'ge': operator.ge, 'gt': operator.gt, 'le': operator.le,
           'lt': operator.lt}
COLLECTIONS = ('SENTINEL-1', 'SENTINEL-2', 'SENTINEL-3', 'SENTINEL-5P', 'SENTINEL-6')
TIMES = {'ContentDate/Start': 'start', 'ContentDate/End': 'end', 'PublicationDate': 'published'}
ATTRIBUTES = collections.OrderedDict((
    ('productType', lambda r: r.producttype),
    ('orbitNumber', lambda r: r.orbit),
    ('timeliness', lambda r: r.timeliness),
    ('platformShortName', lambda r: r.collection),
    ('processingMode', lambda r: r.stream)))


def unquoted(text):
    return text[1:-1].replace("''", "'")


def time_condition(field, word, text):
    time, compare, name = as_time(text), COMPARE[word], TIMES[field]
    low = time if name == 'start' and word in ('eq', 'ge', 'gt') else ''
    high = time if name == 'start' and word in ('eq', 'le', 'lt') else '~'
    return Condition(lambda record: compare(getattr(record, name), time), low, high)


def collection_condition(text):
    if unquoted(text) not in COLLECTIONS:
        raise BadRequest('Invalid value')
    return Condition(lambda record: record.collection == unquoted(text))


def attribute_condition(_, name, text):
    if name not in ATTRIBUTES:
        raise BadRequest('Invalid attribute: %s' % name)
    return Condition(lambda record: ATTRIBUTES[name](record) == unquoted(text))


def area_condition(text):
    found = re.match(r'SRID=4326;POLYGON ?\(\(([-+.\deE, ]+)\)\)$', text)
    if not found:
        raise BadRequest('Invalid geography value: %s' % text)
    points = [[float(number) for number in pair.split()] for pair in found.group(1).split(',')]
    if points[0] != points[-1] or len(points) < 4:
        raise BadRequest('Points of LinearRing do not form a closed linestring')
    return Condition(lambda record: meets_box(record.footprint, bounding_box(points)))


QUOTED = r"'(?:[^']|'')*'"
ATOMS = (
    (r"Collection/Name eq (%s)" % QUOTED, collection_condition),
    (r"Name eq (%s)" % QUOTED, lambda text: Condition(lambda r: r.name == unquoted(text))),
    (r"(%s) (eq|ge|gt|le|lt) ([\d:TZ.+-]+)" % '|'.join(TIMES), time_condition),
    (r"Attributes/OData\.CSC\.StringAttribute/any\((\w+): ?\1/Name eq '(\w+)' and "
     r"\1/OData\.CSC\.StringAttribute/Value eq (%s)\)" % QUOTED, attribute_condition),
    (r"OData\.CSC\.Intersects\(area=geography'([^']*)'\)", area_condition))


class FilterText:
    """The $filter grammar by recursive descent: or, and, parentheses, atoms."""

    def __init__(self, text):
        self.rest = text.strip()

    def take(self, pattern):
        found = re.match(pattern, self.rest)
        self.rest = self.rest[found.end():] if found else self.rest
        return found

    def parse(self):
        whole = self.either()
        if self.rest:
            raise BadRequest('Invalid field: %s' % self.rest.split()[0])
        return whole

    def either(self):
        return self.chain('or', any_of, lambda: self.chain('and', all_of, self.single))

    def chain(self, word, combine, part):
        links = [part()]
        while self.take(r'\s+%s\s+' % word):
            links.append(part())
        return combine(links)

    def single(self):
        if self.take(r'\(\s*'):
            inner = self.either()
            if not self.take(r'\s*\)'):
                raise BadRequest('Invalid filter: ) is missing')
            return inner
        for pattern, build in ATOMS:
            found = self.take(pattern)
            if found:
                return build(*found.groups())
        raise BadRequest('Invalid field: %s' % (self.rest.split() or ['nothing'])[0])


def footprint_text(geometry):
    """A geometry in the text form of OData."""
    if not geometry:
        return None
    text = re.sub(r'\[([^\[\], ]+), ([^\[\], ]+)\]', r'\1 \2', json.dumps(geometry['coordinates']))
    return "geography'SRID=4326;%s %s'" % (
        geometry['type'].upper(), text.replace('[', '(').replace(']', ')'))


def s3_path(record):
    folder = 'AUX/' if '_AUX_' in record.name else 'TROPOMI/' if record.stream else ''
    return '/eodata/%s/%s%s/%s/%s' % (record.collection.title(), folder, record.producttype,
                                      record.start[:10].replace('-', '/'), record.name)


def odata_checksums(space, record):
    text = space.checksum(record)
    return [{'Value': value, 'Algorithm': kind, 'ChecksumDate': record.published}
            for value, kind in ((text, 'MD5'), (text * 2, 'BLAKE3')) if value]


ODATA_FIELDS = collections.OrderedDict((
    ('@odata.mediaContentType', lambda space, r: 'application/octet-stream'),
    ('Id', lambda space, r: r.id),
    ('Name', lambda space, r: r.name),
    ('ContentType', lambda space, r: 'application/octet-stream'),
    ('ContentLength', lambda space, r: space.stated_size(r)),
    ('OriginDate', lambda space, r: r.published),
    ('PublicationDate', lambda space, r: r.published),
    ('ModificationDate', lambda space, r: r.published),
    ('Online', lambda space, r: True),
    ('EvictionDate', lambda space, r: '9999-12-31T23:59:59.999999Z'),
    ('S3Path', lambda space, r: s3_path(r)),
    ('Checksum', odata_checksums),
    ('ContentDate', lambda space, r: {'Start': r.start, 'End': r.end}),
    ('Footprint', lambda space, r: footprint_text(r.footprint)),
    ('GeoFootprint', lambda space, r: r.footprint)))


def odata_attributes(record):
    for name, known in ATTRIBUTES.items():
        value = known(record)
        if value is not None:
            kind = 'Integer' if isinstance(value, int) else 'String'
            yield {'@odata.type': '#OData.CSC.%sAttribute' % kind, 'Name': name, 'Value': value,
                   'ValueType': kind}


def odata_product(space, request, record):
    """A product as OData writes it; $select and $expand are obeyed."""
    wanted = set(request.query.get('$select', '').replace(' ', '').split(',')) - {''}
    for name in wanted - set(ODATA_FIELDS) - {'Attributes'}:
        raise BadRequest('Invalid field: %s' % name)
    product = {name: field(space, record) for name, field in ODATA_FIELDS.items()
               if not wanted or name in wanted or name == 'Id'}
    if ('$expand', 'Attributes') in request.pairs:
        product['Attributes'] = list(odata_attributes(record))
    return product


def odata_context(request):
    expanded = ','.join(value + '()' for name, value in request.pairs if name == '$expand')
    return {'@odata.context': '$metadata#Products' + ('(%s)' % expanded if expanded else '')}


def odata_number(request, name, default, most):
    """A whole number of the query from 0 to `most`; others are refused as the service does it."""
    text = request.query.get(name, str(default))
    detail = {'loc': ['query', name], 'input': text}
    if not text.isdigit():
        detail.update(type='int_parsing', msg='Input should be a valid integer')
    elif int(text) > most:
        detail.update(type='less_than_equal', ctx={'le': most},
                      msg='Input should be less than or equal to %d' % most)
    else:
        return int(text)
    raise Refused(json_answer({'detail': [detail]}, 422))


def odata_page(space, request):
    """A page of products.  The next link ends where $skip would pass 10000."""
    for name, value in request.pairs:
        if name not in ('$filter', '$orderby', '$top', '$skip', '$expand', '$select'):
            raise BadRequest('Invalid query parameter: %s' % name)
        if name == '$expand' and value not in ('Attributes', 'Assets', 'Locations'):
            raise BadRequest('Invalid $expand value: %s' % value)
    top, skip = odata_number(request, '$top', 20, 1000), odata_number(request, '$skip', 0, 10000)
    order = re.match(r'(%s|)( asc| desc|)$' % '|'.join(TIMES), request.query.get('$orderby', ''))
    if not order:
        raise BadRequest('Invalid $orderby value: %s' % request.query['$orderby'])
    text = request.query.get('$filter')
    condition = FilterText(text).parse() if text else EVERYTHING
    order = TIMES.get(order.group(1), 'id'), order.group(2) == ' desc'
    records, following = records_of_page(space, request, condition, order, skip, top)
    page = odata_context(request)
    page['value'] = [odata_product(space, request, record) for record in records]
    if following is not None and following <= 10000:
        page['@odata.nextLink'] = request.link({'$top': top, '$skip': following})
    return json_answer(page)


def odata_single(space, request):
    record = space.find(request.names[0])
    if not record:
        return json_answer({'detail': {'message': 'Product not found'}}, 404)
    return json_answer(dict(odata_context(request), **odata_product(space, request, record)))


# ---- tokens and downloads

def form_fields(request):
    return dict(urllib.parse.parse_qsl(request.body.decode()))


def oauth_error(status, error, text):
    return json_answer({'error': error, 'error_description': text}, status)


def token_endpoint(space, request):
    """Password and refresh grants of the client cdse-public."""
    fields = form_fields(request)
    if fields.get('client_id') != 'cdse-public':
        return oauth_error(401, 'invalid_client', 'Invalid client or Invalid client credentials')
    if fields.get('grant_type') == 'password':
        return space.tokens.login(fields)
    if fields.get('grant_type') == 'refresh_token':
        return space.tokens.refresh(fields.get('refresh_token'))
    return oauth_error(400, 'unsupported_grant_type', 'Unsupported grant_type')


def logout_endpoint(space, request):
    return space.tokens.logout(form_fields(request).get('refresh_token'))


class Tokens:
    """Who holds which token, and until when by the clock of the stand-in."""

    def __init__(self, clock, users, totp, expires_in, refresh_expires_in):
        self.clock, self.users, self.totp = clock, users, totp
        self.expires_in, self.refresh_expires_in = expires_in, refresh_expires_in
        self.lock = threading.Lock()
        self.access, self.renewal = {}, {}          # token: (session, end)
        self.made = self.logins = self.refreshes = self.logouts = 0

    def login(self, fields):
        code = self.totp() if callable(self.totp) else self.totp
        with self.lock:
            if (fields.get('username'), fields.get('password')) not in self.users.items() or (
                    code and fields.get('totp') != code):
                return oauth_error(401, 'invalid_grant', 'Invalid user credentials')
            self.logins += 1
            return self.give('session-%d' % self.logins)

    def refresh(self, text):
        with self.lock:
            session, end = self.renewal.pop(text, (None, 0))
            if session is None or end <= self.clock():
                return oauth_error(400, 'invalid_grant', 'Token is not active')
            self.refreshes += 1
            return self.give(session)

    def logout(self, text):
        with self.lock:
            session, _ = self.renewal.pop(text, (None, 0))
            if session is None:
                return oauth_error(400, 'invalid_grant', 'Invalid refresh token')
            self.logouts += 1
            self.access = {text: held for text, held in self.access.items() if held[0] != session}
            return Answer(status=204)

    def give(self, session):
        self.made += 1
        access, renewal = ('eyJ.%s.%s.%d' % (kind, session, self.made) for kind in 'ar')
        self.access[access] = session, self.clock() + self.expires_in
        self.renewal[renewal] = session, self.clock() + self.refresh_expires_in
        return json_answer({
            'access_token': access, 'expires_in': self.expires_in, 'refresh_token': renewal,
            'refresh_expires_in': self.refresh_expires_in, 'token_type': 'Bearer',
            'not-before-policy': 0, 'session_state': session,
            'scope': 'AUDIENCE_PUBLIC openid email profile ondemand_processing user-context'})

    def refusal(self, header):
        """The answer to a missing, foreign or old bearer token; None for a good one."""
        kind, _, text = (header or '').partition(' ')
        if kind.lower() != 'bearer':
            return zip_problem(401, 604, 'Token not found')
        if text.startswith('sh-'):
            return zip_problem(401, 609, 'Token audience not allowed')
        with self.lock:
            if self.access.get(text, (None, 0))[1] <= self.clock():
                return zip_problem(401, 109, 'Token is expired')


def byte_span(text, size):
    """First and last byte of a Range header; None where it is ignored, () where it misses."""
    found = re.match(r'bytes=(\d*)-(\d*)$', text or '')
    if not found or found.groups() == ('', ''):
        return None
    first, last = found.groups()
    if not first:
        first, last = max(0, size - int(last)), ''
    first, last = int(first), min(int(last or size), size - 1)
    return (first, last) if first <= last else ()


def product_value(space, request):
    """The content of a product, for the bearer of a token, in at most so many transfers."""
    number, node = request.names
    if "'" in (node or ''):
        return zip_problem(400, 104, 'Malformed OData request path')
    if not re.match('[0-9a-fA-F-]{36}$', number):
        return zip_problem(422, 111, 'Product ID is not a valid UUID')
    refusal = space.tokens.refusal(request.headers.get('Authorization'))
    if refusal:
        return refusal
    record = space.find(number)
    if not record:
        return zip_problem(404, 112, 'Product not found in catalogue')
    if not space.begin_transfer():
        return zip_problem(429, 100, 'Max session number exceeded', **{'trace-id': NO_TRACE})
    answer = content_answer(space, request, record)
    answer.close = space.end_transfer
    return answer


def content_answer(space, request, record):
    """The content or the part of it that is asked; If-Range is obeyed (by a strong ETag only)."""
    size, version = space.size(record), space.versions[record.id]
    etag = space.etag and space.etag % (record.id, version)
    condition = request.headers.get('If-Range')
    unchanged = condition is None or condition == etag and etag.startswith('"')
    wanted = byte_span(request.range, size) if unchanged else None
    if wanted == ():
        answer = zip_problem(416, 416, 'Requested range not satisfiable')
        answer.headers['Content-Range'] = 'bytes */%d' % size
        return answer
    first, last = wanted or (0, size - 1)
    name = record.name if record.name.endswith('.nc') else record.name + '.zip'
    answer = Answer(b'', 206 if wanted else 200, 'application/octet-stream', {
        'Accept-Ranges': 'bytes', **({'ETag': etag} if etag else {}),
        'Content-Disposition': 'attachment; filename=' + name})
    if wanted:
        answer.headers['Content-Range'] = 'bytes %d-%d/%d' % (first, last, size)
    answer.length, answer.record = last - first + 1, record
    answer.blocks = content_blocks(record, size, version, first)
    return answer.keep(answer.length)


# ---- OpenSearch, as it was until March 2026

def resto_refusal(status, message, detail):
    return json_answer({'detail': {'ErrorMessage': message, 'ErrorCode': status,
                                   'ErrorDetail': detail, 'RequestID': NO_TRACE}}, status)


def resto_invalid(names, text):
    return Refused(resto_refusal(400, 'Validation error.', [{'loc': names, 'msg': text}]))


def resto_box(text):
    box = [float(number) for number in text.split(',')]
    return Condition(lambda record: meets_box(record.footprint, box))


def resto_geometry(text):
    numbers = [float(number) for number in re.findall(r'-?\d+(?:\.\d+)?', text)]
    box = bounding_box(list(zip(numbers[::2], numbers[1::2])))
    return Condition(lambda record: meets_box(record.footprint, box))


# A product is found if it lies within startDate and completionDate: containment, not overlap.
RESTO_TESTS = {
    'startDate': lambda text: Condition(lambda r: r.start >= as_time(text), low=as_time(text)),
    'completionDate': lambda text: Condition(lambda r: r.end <= as_time(text), high=as_time(text)),
    'productType': lambda text: Condition(lambda record: record.producttype == text),
    'box': resto_box, 'geometry': resto_geometry}
RESTO_NUMBERS = ('maxRecords', 20, 2000), ('page', 1, None), ('index', 1, 10001)
RESTO_NAMES = set(RESTO_TESTS) | set('maxRecords page index sortParam sortOrder'.split())
RESTO_ORDER = {'startDate': 'start', 'completionDate': 'end', None: 'id'}


def resto_retired(space, request):
    """What the service may answer since it is switched off; what it does is not known."""
    what = space.opensearch_mode.replace('retired-', '')
    if what == 'empty':
        return Answer(kind='text/html')
    if what == 'json':
        return json_answer({'message': 'The OpenSearch catalogue has been decommissioned'})
    answer = html_page('The OpenSearch catalogue has been decommissioned',
                       200 if what == 'html' else int(what))
    if what in ('301', '302'):
        answer.headers['Location'] = request.base + '/news'
    return answer


def resto_condition(request, collection):
    unknown = sorted(set(request.query) - RESTO_NAMES)
    if unknown:
        raise Refused(resto_refusal(400, 'Unknown query parameter(s).', {
            'loc': unknown, 'msg': 'Query parameters do not exist.'}))
    tests = [Condition(lambda record: collection in (None, record.collection))]
    for name in request.query:
        try:
            tests += [RESTO_TESTS[name](request.query[name])] if name in RESTO_TESTS else []
        except (BadRequest, ValueError) as error:
            raise resto_invalid([name], str(error)) from None
    return all_of(tests)


def resto_numbers(query):
    """How many to skip, and maxRecords."""
    numbers = {}
    for name, default, high in RESTO_NUMBERS:
        text = query.get(name, str(default))
        if not text.isdigit():
            raise resto_invalid([name], 'Input should be a valid integer.')
        if high and int(text) > high:
            raise resto_invalid([name], 'Input should be less than or equal to %d.' % high)
        numbers[name] = int(text)
    skip = (numbers['page'] - 1) * numbers['maxRecords'] + numbers['index'] - 1
    if not 0 <= skip <= 10000:
        raise resto_invalid(['page', 'maxRecords', 'index'], (
            "The '(page - 1) * maxRecords + index - 1' should be less than 10000."))
    return skip, numbers['maxRecords']


def resto_search(space, request):
    """A page of /resto/api/collections/<Collection>/search.json."""
    if space.opensearch_mode != 'on':
        return resto_retired(space, request)
    name = request.names[0]
    collection = name and re.sub('(?i)^sentinel-?', 'SENTINEL-', name)
    if name and collection not in COLLECTIONS:
        return resto_refusal(404, 'Unknown collection.', [
            {'loc': ['collection'], 'msg': "Collection '%s' does not exist." % name}])
    query, condition = request.query, resto_condition(request, collection)
    skip, most = resto_numbers(query)
    if query.get('sortParam') not in RESTO_ORDER:
        raise resto_invalid(['sortParam'], 'Input should be startDate or completionDate.')
    order = RESTO_ORDER[query.get('sortParam')], query.get('sortOrder') == 'descending'
    records, following = records_of_page(space, request, condition, order, skip, most)
    return json_answer({'type': 'FeatureCollection', 'properties': {
        'id': NO_TRACE, 'totalResults': None, 'exactCount': 0,
        'startIndex': skip + 1, 'itemsPerPage': most,
        'links': list(resto_links(request, most, skip, following))},
        'features': [resto_feature(space, request, record) for record in records]})


def resto_links(request, most, skip, following):
    pages = [('self', {})]
    if skip:
        pages.append(('first', {'page': 1}))
    if following is not None and following <= 10000:
        even = following % most == 0 and 'index' not in request.query
        pages.append(('next', {'page': following // most + 1} if even else
                      {'page': 1, 'index': following + 1}))
    for rel, changes in pages:
        yield {'rel': rel, 'type': 'application/json', 'title': rel, 'href': request.link(changes)}


def resto_feature(space, request, record):
    """A product as OpenSearch wrote it."""
    return {'type': 'Feature', 'id': record.id, 'geometry': record.footprint, 'properties': {
        'collection': record.collection, 'status': 'ONLINE',
        'license': {'licenseId': 'unlicensed', 'hasToBeSigned': 'never', 'viewService': 'public',
                    'signatureQuota': -1, 'description': {'shortName': 'No license'}},
        'productIdentifier': s3_path(record), 'parentIdentifier': None, 'title': record.name,
        'startDate': record.start, 'completionDate': record.end,
        'productType': record.producttype, 'processingLevel': '', 'platform': record.name[:3],
        'orbitNumber': record.orbit, 'updated': record.published, 'published': record.published,
        'cloudCover': 0, 'centroid': {'type': None, 'coordinates': None},
        'timeliness': record.timeliness, 'relativeOrbitNumber': 0,
        'services': {'download': {
            'url': '%s/download/%s' % (request.base, record.id),
            'mimeType': 'application/octet-stream', 'size': space.stated_size(record)}}}}


# ---- STAC, as stac-fastapi with pgstac answers

TYPES_5P = (
    'L2__AER_AI', 'L2__AER_LH', 'L2__CH4___', 'L2__CLOUD_', 'L2__CO____', 'L2__HCHO__',
    'L2__NO2___', 'L2__NP_BD3', 'L2__NP_BD6', 'L2__NP_BD7', 'L2__O3____', 'L2__O3_TCL',
    'L2__O3__PR', 'L2__SO2___') + tuple('L1B_RA_BD%d' % band for band in range(1, 9))
BAND = typed_geometry('Polygon', '180,-20 -180,-20 -180,20 180,20 180,-20')


def stac_type(producttype, stream):
    """The collection of a Sentinel-5P type and stream; there is none for L1B_IR and AUX."""
    if producttype in TYPES_5P:
        return 'sentinel-5p-l%s-%s-%s' % (producttype[1], re.sub(
            '_+', '-', producttype[4:].strip('_')).lower(), stream.lower())


def rewritten(record):
    """Reprocessed tropospheric ozone is shown among OFFL, under an id that is not its name."""
    return (record.producttype, record.stream) == ('L2__O3_TCL', 'RPRO')


def stac_collection(record):
    if record.collection == 'SENTINEL-5P':
        return stac_type(record.producttype, 'OFFL' if rewritten(record) else record.stream)
    word = re.sub('_+', '-', record.producttype.strip('_')).lower().replace('ol-', 'olci-')
    when = {'NT': 'ntc', 'ST': 'stc', 'NR': 'nrt'}.get(record.timeliness)
    return {'SENTINEL-1': 'sentinel-1-grd', 'SENTINEL-2': 'sentinel-2-l' + word[-2:]}.get(
        record.collection, '%s-%s-%s' % (record.collection.lower(), word, when))


def stac_id(record):
    stem = record.stem
    return 'S5P_OFFL' + stem[8:57] + '_01_' + stem[61:] if rewritten(record) else stem


def stac_geometry(record):
    return BAND if record.producttype == 'L2__O3_TCL' else record.footprint


def stac_item(space, request, record):
    """A product as STAC writes it."""
    geometry = stac_geometry(record)
    points = [point for outline in outlines(geometry) for point in outline]
    start, end = (text.replace('.000000Z', 'Z') for text in (record.start, record.end))
    category = record.timeliness or record.stream
    properties = {
        'created': record.published, 'updated': record.published, 'published': record.published,
        'datetime': start, 'start_datetime': start, 'end_datetime': end,
        'platform': record.collection.lower(), 'constellation': record.collection.lower(),
        'sat:absolute_orbit': record.orbit, 'product:type': record.producttype,
        'expires': '9999-01-01T00:00:00.000000Z'}
    if category not in (None, 'RPRO'):
        properties['product:timeliness_category'] = category
    return {'type': 'Feature', 'stac_version': '1.1.0', 'stac_extensions': [],
            'collection': stac_collection(record), 'id': stac_id(record), 'links': [],
            'bbox': bounding_box(points) if points else None, 'geometry': geometry,
            'properties': properties, 'assets': stac_assets(space, request, record)}


def stac_assets(space, request, record):
    products = '%s/odata/v1/Products(%s)' % (request.base, record.id)
    asset = {'roles': ['data'], 'type': 'application/zip', 'href': products + '/$value',
             'file:local_path': record.name + '.zip', 'file:size': space.stated_size(record)}
    if record.checksum:
        asset['file:checksum'] = 'd50110' + space.checksum(record)
    if not record.name.endswith('.nc'):
        return {'Product' if record.collection == 'SENTINEL-1' else 'product': asset}
    asset.update({'type': 'application/netcdf', 'href': 's3:/' + s3_path(record),
                  'file:local_path': record.name, 'alternate': {'https': {
                      'href': '%s/Nodes(%s)/$value' % (products, record.name),
                      'alternate:name': 'HTTPS', 'auth:refs': ['oidc'], 'storage:refs': []}}})
    return {'netcdf': asset}


def stac_document(request, name, producttypes):
    return {'type': 'Collection', 'stac_version': '1.1.0', 'id': name, 'title': name,
            'description': 'This Collection provides ' + name, 'license': 'other',
            'links': [{'rel': 'self', 'href': '%s/v1/collections/%s' % (request.base, name)}],
            'summaries': {'product:type': producttypes}, 'extent': {
                'spatial': {'bbox': [[-180, -90, 180, 90]]},
                'temporal': {'interval': [['2014-04-03T00:00:00Z', None]]}}}


def stac_collections(space, request):
    some = list(space.stac_collections().items())[:int(request.query.get('limit', 10))]
    return json_answer({'collections': [stac_document(request, *pair) for pair in some],
                        'links': []})


FIRST_PAGE = 'bmV4dDow'             # next:0 in base64


def stac_search(space, request):
    """A page of /v1/search, asked by GET or POST."""
    search = json.loads(request.body.decode()) if request.method == 'POST' else request.query
    if request.method == 'POST' and 'token' not in search and (
            not isinstance(search.get('filter', {}), dict)):
        raise BadRequest('Input should be a valid dictionary: filter')
    skip = int(base64.urlsafe_b64decode(search.get('token', FIRST_PAGE)).decode()[5:])
    limit = int(search.get('limit', 10))
    tests = [Condition(lambda record: stac_collection(record) is not None)]
    tests += [STAC_TESTS[name](search[name]) for name in sorted(STAC_TESTS) if search.get(name)]
    records, following = records_of_page(space, request, all_of(tests),
                                         stac_order(search.get('sortby')), skip, limit)
    items = [without(stac_item(space, request, record), search.get('fields'))
             for record in records]
    links = [{'rel': 'self', 'href': request.base + request.target}]
    if following is not None:
        links.append(stac_next(space, request, search, following))
    return json_answer({'type': 'FeatureCollection', 'features': items, 'links': links,
                        'numberReturned': len(items)}, **{'Content-Type': 'application/geo+json'})


def stac_next(space, request, search, following):
    """The next link: by GET, or by POST with the whole body."""
    word = base64.urlsafe_b64encode(b'next:%d' % following).decode()
    link = {'rel': 'next', 'type': 'application/geo+json'}
    if request.method == 'GET' and space.stac_next == 'GET':
        return dict(link, method='GET', href=request.link({'token': word}))
    body = dict(search, token=word)
    return dict(link, method='POST', href=request.base + request.path, body=body)


def as_list(value):
    return value.split(',') if isinstance(value, str) else value


def stac_period(text):
    """Overlap, ends included."""
    first, slash, last = text.partition('/')
    low, high = (blank if end in ('', '..') else as_time(end)
                 for end, blank in ((first, ''), (last if slash else first, '~')))
    return Condition(lambda record: record.start <= high and record.end >= low, high=high)


def stac_box(value):
    west, south, east, north = [float(number) for number in as_list(value)]
    west, east = min(west, east), max(west, east)       # so the service reads it: the long way
    return Condition(lambda record: meets_box(stac_geometry(record), (west, south, east, north)))


def stac_area(value):
    lines = outlines(json.loads(value) if isinstance(value, str) else value)
    return any_of([Condition(lambda record, box=bounding_box(line): meets_box(
        stac_geometry(record), box)) for line in lines])


def stac_filter(text):
    """product:type = 'X', in cql2-text by GET, in cql2-json by POST."""
    if isinstance(text, dict):
        if (text['op'], text['args'][0]) != ('=', {'property': 'product:type'}):
            raise BadRequest('Filter not understood by the stand-in: %s' % text)
        return Condition(lambda record: record.producttype == text['args'][1])
    found = re.match(r"\"?product:type\"?\s*=\s*(%s)$" % QUOTED, text)
    if not found:
        raise BadRequest('Filter not understood by the stand-in: %s' % text)
    return Condition(lambda record: record.producttype == unquoted(found.group(1)))


STAC_TESTS = {
    'collections': lambda value: Condition(lambda r: stac_collection(r) in as_list(value)),
    'datetime': stac_period, 'bbox': stac_box, 'intersects': stac_area, 'filter': stac_filter}


def stac_order(sortby):
    """By start; descending or not, the newest first where nothing is asked."""
    if isinstance(sortby, list):
        sortby = ('-' if sortby[0].get('direction') == 'desc' else '') + sortby[0]['field']
    if not re.match(r'[+ -]?(properties\.)?(start_)?datetime$', sortby or 'datetime'):
        raise BadRequest('Sort field not understood by the stand-in: %s' % sortby)
    return 'start', (sortby or '-').startswith('-')


def without(item, fields):
    """The item without the fields `-a.b`; to choose fields is not understood here."""
    for name in as_list(fields or []):
        sign, outer, inner = re.match(r'(-?)(\w+)\.(.+)$', name).groups()
        if not sign:
            raise BadRequest('Fields not understood by the stand-in: %s' % name)
        item[outer].pop(inner, None)
    return item


AUTH = '/auth/realms/CDSE/protocol/openid-connect/'
ROUTES = (
    ('value', ('GET',), r'/odata/v1/Products\(([^)]*)\)(?:/Nodes\((.*)\))?/\$value', product_value),
    ('product', ('GET',), r'/odata/v1/Products\(([^)]*)\)', odata_single),
    ('odata', ('GET',), r'/odata/v1/Products', odata_page),
    ('opensearch', ('GET',), r'/resto/api/collections(?:/([^/]+))?/search\.json', resto_search),
    ('stac', ('GET', 'POST'), r'/v1/search', stac_search),
    ('stac', ('GET',), r'/v1/collections', stac_collections),
    ('token', ('POST',), AUTH + 'token', token_endpoint),
    ('logout', ('POST',), AUTH + 'logout', logout_endpoint),
    ('news', ('GET',), r'/news', lambda space, request: html_page('News')))


# ---- faults

FAULTS = {}


def fault(*kinds):
    """Register a function (space, request, respond, detail) -> answer under some names."""
    return lambda function: FAULTS.update(dict.fromkeys(kinds, function)) or function


class SwitchedFault:
    """A fault that is on: after the first `after` matching requests it takes the next `times`."""

    def __init__(self, kind, on, times, after, name, detail):
        self.kind, self.on, self.times, self.after, self.name = kind, on, times, after, name
        self.act, self.detail, self.taken = FAULTS[kind], dict(detail, kind=kind), 0

    def takes(self, request):
        spent = self.times is not None and self.taken >= self.times
        other = self.on not in (request.kind, None) or (self.name or '') not in request.text
        if spent or other or self.kind in RANGE_FAULTS and not request.range:
            return False
        self.after -= 1
        self.taken += self.after < 0
        return self.after < 0


class Switchboard:
    """The faults that are on.  A request meets at most one: the first added that takes it."""

    def __init__(self):
        self.lock, self.on = threading.Lock(), []

    def add(self, kind, on='value', times=1, after=0, name=None, **detail):
        """Switch a fault on; `on` is a kind of request or None, `name` a part of url or body."""
        with self.lock:
            self.on.append(SwitchedFault(kind, on, times, after, name, detail))
            return self.on[-1]

    def clear(self):
        with self.lock:
            del self.on[:]

    def take(self, request):
        with self.lock:
            return next((switched for switched in self.on if switched.takes(request)), None)


def place_of_fault(answer, detail):
    return detail.get('at', (answer.length or 0) // 2)


@fault('400', '401', '403', '404', '408', '429', '500', '502', '503', '504')
def fault_status(space, request, respond, detail):
    """`text` is the message; `retry_after` seconds, or 'date' for a date `seconds` from now."""
    status, wait = int(detail['kind']), detail.get('retry_after')
    text = detail.get('text', 'Switched on by a test')
    if status >= 500:
        answer = html_page(text, status)
    elif request.kind == 'token':
        answer = oauth_error(status, 'invalid_grant', text)
    else:
        answer = zip_problem(status, 109 if status == 401 else status, text)
    if wait == 'date':
        wait = email.utils.formatdate(time.time() + detail.get('seconds', 1), usegmt=True)
    if wait is not None:
        answer.headers['Retry-After'] = str(wait)
    return answer


@fault('redirect')
def fault_redirect(space, request, respond, detail):
    """With `status` to the url `to`, where {target} stands for the path and query asked."""
    answer = html_page('Moved', detail.get('status', 302))
    answer.headers['Location'] = detail['to'].replace('{target}', request.target)
    return answer


@fault('html', 'json', 'empty')
def fault_other_page(space, request, respond, detail):
    """An error page that says 200."""
    return {'html': html_page('Service temporarily unavailable'), 'empty': Answer(),
            'json': zip_problem(200, 500, 'Internal error')}[detail['kind']]


@fault('fin', 'rst', 'stall-body', 'drop', 'stall-headers')
def fault_end(space, request, respond, detail):
    """The connection ends, or falls silent, after `at` bytes of the body; or before the answer."""
    if detail['kind'] in ('drop', 'stall-headers'):
        answer = Answer(status=None)
    else:
        answer = respond()
        answer.keep(place_of_fault(answer, detail))
    answer.end = detail['kind']
    return answer


@fault('cut')
def fault_cut(space, request, respond, detail):
    """Body and Content-Length end together after `at` bytes, so only the catalogue knows."""
    answer = respond()
    answer.length = place_of_fault(answer, detail)
    return answer.keep(answer.length)


@fault('chunked', 'chunked-ok', 'no-length')
def fault_chunked(space, request, respond, detail):
    """In chunks; the last of them is missing, or all is well; or no length is told at all."""
    answer = respond()
    answer.chunked = detail['kind'] != 'no-length'
    answer.length = answer.length if answer.chunked else None
    if detail['kind'] == 'chunked':
        answer.keep(place_of_fault(answer, detail)).end = 'fin'
    return answer


@fault('flip')
def fault_flip(space, request, respond, detail):
    answer = respond()
    body = bytearray(answer.body)
    body[place_of_fault(answer, detail)] ^= 1
    answer.body = bytes(body)
    return answer


ZIPS = {        # the names in a zip; {} is the product's without extension
    'zip': ('{}/{}.nc', '{}/{}.cdl'), 'two-files': ('a.nc', 'b.nc'), 'broken-zip': ('{}.nc',),
    'flipped-zip': ('{}.nc',), 'zip-of-paths': ('../../out.nc',)}


@fault(*ZIPS)
def fault_zip(space, request, respond, detail):
    """The file in a zip, as S5P products came until the end of 2024; or one that is no good."""
    request.range = None
    answer = respond()
    if answer.record:
        packed, stem = io.BytesIO(), answer.record.stem
        with zipfile.ZipFile(packed, 'w') as archive:
            for name in ZIPS[detail['kind']]:
                archive.writestr(name.format(stem, stem), answer.body)
        answer.body = packed.getvalue()[:-40 if detail['kind'] == 'broken-zip' else None]
        if detail['kind'] == 'flipped-zip':         # a byte in the middle of the file
            answer.body = answer.body[:9999] + bytes([answer.body[9999] ^ 1]) + answer.body[10000:]
    return answer


RANGE_FAULTS = ('ignore-range', 'wrong-range', '416', 'headless-206', 'lying-range', 'blind-206')


@fault('uninvited-206', *RANGE_FAULTS)          # all but the first wait for a request with Range
def fault_range(space, request, respond, detail):
    """The whole; the part `by` bytes later, which it says; a refusal; a part that says no range;
    other bytes than it says; a part of a new object; or a part that nobody asked for."""
    kind = detail['kind']
    if kind == 'wrong-range':
        first = int(re.search(r'\d+', request.range).group())
        request.range = 'bytes=%d-' % (first + detail.get('by', 100))
    elif kind == 'blind-206':
        space.change(request.names[0])
        del request.headers['If-Range']
    else:
        request.range = {'ignore-range': None, '416': 'bytes=%d-' % (1 << 60),
                         'uninvited-206': 'bytes=100-'}.get(kind, request.range)
    answer = respond()
    if kind == 'headless-206':
        del answer.headers['Content-Range']
    elif kind == 'lying-range':
        answer.blocks = [bytes(answer.length)]
    return answer


@fault('changed')
def fault_changed(space, request, respond, detail):
    """From now on it is another object, of another ETag."""
    space.change(request.names[0])
    return respond()


@fault('trickle', 'leisurely')
def fault_slow(space, request, respond, detail):
    """The last 100 bytes come one by one, `every` so many seconds; or half of all after a while."""
    answer = respond()
    pause = detail.get('every', 0.03)

    def pieces(body):
        late, step = (100, 1) if detail['kind'] == 'trickle' else [len(body) - len(body) // 2] * 2
        yield body[:len(body) - late]
        for k in range(len(body) - late, len(body), step):
            space.closing.wait(pause)
            yield body[k:k + step]
    if answer.record:
        answer.blocks = pieces(answer.body)
    return answer


@fault('empty-page', 'short-page', 'repeat')
def fault_page(space, request, respond, detail):
    """No products but a next link; half as many as asked; the first page for ever, with next
    links that differ, or not if `same_link`."""
    request.trick = detail
    return respond()


@fault('no-link')
def fault_no_link(space, request, respond, detail):
    """The page does not say that more follows."""
    page = json.loads(respond().body.decode())
    page.pop('@odata.nextLink', None)
    page.get('properties', {}).pop('links', None)
    return json_answer(page)


@fault('told')
def fault_told(space, request, respond, detail):
    """The answer that the test tells: `body`, bytes or what becomes JSON, with `status`."""
    body, status = detail['body'], detail.get('status', 200)
    return Answer(body, status) if isinstance(body, bytes) else json_answer(body, status)


# ---- the server

class LoopbackHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = 'HTTP/1.1', True

    def setup(self):
        if self.server.owner.tls:       # here, so that a slow handshake holds up nobody else
            self.request.settimeout(10)
            self.request.do_handshake()
            self.request.settimeout(None)
        http.server.BaseHTTPRequestHandler.setup(self)

    def serve(self):
        self.server.owner.serve(self)

    do_GET = do_POST = do_CONNECT = serve

    def log_message(self, *words):
        pass


class LoopbackServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 128

    def server_bind(self):              # HTTPServer would ask the name service for its own name
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self):
        connection, address = self.socket.accept()
        if self.owner.tls:
            connection = self.owner.tls.wrap_socket(connection, server_side=True,
                                                    do_handshake_on_connect=False)
        return connection, address

    def process_request_thread(self, request, client_address):
        with self.owner.noted(request):
            socketserver.ThreadingMixIn.process_request_thread(self, request, client_address)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):          # those are clients that went away
            self.owner.errors.append(error)


class Loopback:
    """A threaded HTTP/1.1 server on 127.0.0.1 that answers by self.serve(handler).

    Leaving the context closes every connection, waits for the threads, and raises what went
    wrong in the server itself, so that this does not pass unseen."""

    def __init__(self, tls=None):
        self.tls, self.scheme = tls, 'https' if tls else 'http'
        self.lock, self.closing, self.errors = threading.Lock(), threading.Event(), []
        self.open = {}                  # connection: its thread

    def __enter__(self):
        self.server = LoopbackServer(('127.0.0.1', 0), LoopbackHandler)
        self.server.owner, self.port = self, self.server.server_address[1]
        self.url = '%s://127.0.0.1:%d' % (self.scheme, self.port)
        self.loop = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.loop.start()
        return self

    def __exit__(self, kind, error, trace):
        self.closing.set()
        self.server.shutdown()
        self.loop.join()
        self.server.server_close()
        with self.lock:
            connections = list(self.open.items())
        for connection, thread in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(5)
        if self.errors and error is None:
            raise self.errors[0]

    @contextlib.contextmanager
    def noted(self, connection):
        with self.lock:
            self.open[connection] = threading.current_thread()
        try:
            yield
        finally:
            with self.lock:
                del self.open[connection]

    def wait_for_client(self, connection):
        """Return when the client has gone or the server stops."""
        while not self.closing.is_set() and not select.select([connection], [], [], 0.05)[0]:
            pass


class DataSpace(Loopback):
    """The stand-in of the Data Space: three catalogues, token endpoint, downloads, faults.

    content_size: bytes of every product.  max_transfers: None for any number; release_delay:
    seconds that a session still counts after its transfer.  clock: of the tokens.  page_limit: most
    products on a page, whatever is asked.  opensearch: 'on', or 'retired-' with 404, 410, 301, 503,
    html, json or empty.  stac_next: method of next links.  keep_pages: remember the pages of the
    catalogues, so that a benchmark does not measure them.  After MOST_REQUESTS all are refused, so
    that a client that asks for ever comes to its end."""

    MOST_REQUESTS = 5000

    def __init__(self, records=None, tls=None, content_size=20000, max_transfers=4,
                 release_delay=0, expires_in=600, users=None, totp=None, page_limit=None,
                 latency=0, opensearch='on', clock=time.monotonic, refresh_expires_in=3600,
                 stac_next='GET', keep_pages=False, etag='"%s-%d"'):
        Loopback.__init__(self, tls)
        self.records = RECORDS if records is None else records
        self.content_size, self.latency, self.page_limit = content_size, latency, page_limit
        self.max_transfers, self.release_delay, self.etag = max_transfers, release_delay, etag
        self.opensearch_mode, self.stac_next = opensearch, stac_next
        self.pages = {} if keep_pages else None
        self.tokens = Tokens(clock, {'user': 'password'} if users is None else users, totp,
                             expires_in, refresh_expires_in)
        self.faults, self.requests, self.kinds = Switchboard(), [], collections.Counter()
        self.versions = collections.Counter()
        self.transfers, self.peak_transfers, self.lingering = 0, 0, []
        rows = sorted((record.start, record.id, k) for k, record in enumerate(self.records))
        self.starts, self.order = [start for start, _, _ in rows], [k for _, _, k in rows]
        self.places = {id: k for _, id, k in rows}

    def __enter__(self):
        Loopback.__enter__(self)
        self.odata, self.opensearch, self.stac, self.token_url = (
            self.url + path for path in ('/odata/v1', '/resto/api', '/v1', AUTH + 'token'))
        return self

    logins = property(lambda self: self.tokens.logins)
    refreshes = property(lambda self: self.tokens.refreshes)
    logouts = property(lambda self: self.tokens.logouts)

    def href(self, record):
        return '%s/Products(%s)/$value' % (self.odata, record.id)

    def find(self, id):
        return self.records[self.places[id]] if id in self.places else None

    def size(self, record):
        """The number of bytes that a download of the record delivers now."""
        return self.content_size if record.content is None else record.content

    def stated_size(self, record):
        return self.size(record) if record.stated is None else record.stated

    def body(self, record):
        """The bytes that a download of the record delivers now."""
        return body_of(record, self.size(record), self.versions[record.id])

    def md5(self, record):
        return md5_of(record.id, record.name, self.size(record), self.versions[record.id])

    def checksum(self, record):
        return self.md5(record) if record.checksum == 'MD5' else record.checksum

    def change(self, id):
        """Put another object in the place of a product, here and in the catalogues."""
        with self.lock:
            self.versions[id] += 1

    def count(self, kind):
        """Requests so far to value, product, odata, opensearch, stac, token or logout."""
        return self.kinds[kind]

    def revoke_tokens(self, refresh=False):
        """Refuse the access tokens given so far, and the refresh tokens if told, from now on."""
        with self.tokens.lock:
            self.tokens.access.clear()
            if refresh:
                self.tokens.renewal.clear()

    def begin_transfer(self):
        with self.lock:
            now = time.monotonic()
            self.lingering = [end for end in self.lingering if end > now]
            if self.max_transfers and self.transfers + len(self.lingering) >= self.max_transfers:
                return False
            self.transfers += 1
            self.peak_transfers = max(self.peak_transfers, self.transfers)
            return True

    def end_transfer(self):
        with self.lock:
            self.transfers -= 1
            self.lingering.append(time.monotonic() + self.release_delay)

    def stac_collections(self):
        """The names of the collections, each with its product types: all of Sentinel-5P, whether
        there are products or not, and those of the records."""
        known = {stac_type(kind, stream): {kind} for kind in TYPES_5P
                 for stream in ('NRTI', 'OFFL', 'RPRO')}
        for record in itertools.islice(self.records, 1000):
            known.setdefault(stac_collection(record), set()).add(record.producttype)
        return {name: sorted(kinds) for name, kinds in sorted(known.items(), key=str) if name}

    def passing(self, condition, key, descending):
        """Yield the records that pass, in the order asked."""
        low = bisect.bisect_left(self.starts, condition.low)
        places = self.order[low:max(low, bisect.bisect_right(self.starts, condition.high))]
        if key != 'start':
            places.sort(key=lambda k: (getattr(self.records[k], key), self.records[k].id))
        for place in reversed(places) if descending else places:
            if condition.test(self.records[place]):
                yield self.records[place]

    def serve(self, handler):
        """Read a request, note it, let a fault or the endpoint answer, send."""
        host = handler.headers.get('Host', '127.0.0.1:%d' % self.port)
        body = handler.rfile.read(int(handler.headers.get('Content-Length') or 0))
        request = Request(handler.command, handler.path, handler.headers, body,
                          '%s://%s' % (self.scheme, host))
        with self.lock:
            self.requests.append((request.method, handler.path, dict(handler.headers), body))
            self.kinds[request.kind] += 1
        if self.latency:
            self.closing.wait(self.latency)
        switched, answers = self.faults.take(request), []

        def respond():
            answers.append(self.respond(request))
            return answers[-1]
        try:
            self.send(handler, switched.act(self, request, respond, switched.detail) if switched
                      else respond())
        finally:
            for answer in answers:
                answer.release()

    def respond(self, request):
        """The answer of the endpoint."""
        key = (request.base, request.target)
        kept = self.pages is not None and request.kind in ('odata', 'opensearch', 'stac') and (
            request.method == 'GET' and not request.trick)
        if kept and key in self.pages:
            return Answer(self.pages[key])
        try:
            answer = request.endpoint(self, request)
        except Refused as refused:
            answer = refused.answer
        except BadRequest as error:
            answer = json_answer({'detail': {'message': str(error)}}, 400)
        if len(self.requests) > self.MOST_REQUESTS:
            answer = json_answer({'detail': 'Too many requests for a test'}, 400)
        if kept and answer.status == 200:
            self.pages[key] = answer.body
        return answer

    def send(self, handler, answer):
        if answer.status:
            handler.send_response(answer.status)
            for name, text in answer.headers.items():
                handler.send_header(name, text)
            if answer.chunked:
                handler.send_header('Transfer-Encoding', 'chunked')
            elif answer.length is None:
                handler.send_header('Connection', 'close')
            elif answer.status != 204:
                handler.send_header('Content-Length', str(answer.length))
            handler.end_headers()
            self.send_body(handler, answer)
        if answer.end in ('stall-body', 'stall-headers'):
            self.wait_for_client(handler.connection)
        if answer.end or answer.length is None or self.closing.is_set():
            handler.close_connection = True
        if answer.end == 'rst':
            answer.release()
            reset_connection(handler.connection)

    def send_body(self, handler, answer):
        for block in filter(None, last_byte_apart(answer)):
            if self.closing.is_set():
                return
            handler.wfile.write(b'%x\r\n%s\r\n' % (len(block), block) if answer.chunked else block)
        if answer.chunked and not answer.end:
            handler.wfile.write(b'0\r\n\r\n')


def reset_connection(connection):
    """Close with a reset instead of an orderly end."""
    plain = socket.socket(fileno=connection.detach())
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    plain.close()


# ---- names, certificates, proxies

@contextlib.contextmanager
def names_on_loopback(mapping):
    """Names of the mapping lead to the server given there, whatever port is asked; 127.0.0.1 and
    localhost stay; any other name is an OSError, so nothing leaves this machine."""
    ports = {name: server.port for name, server in mapping.items()}
    real = socket.getaddrinfo

    def fake(host, port, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host or 'localhost'
        if name in ports:
            return real('127.0.0.1', ports[name], *args, **kwargs)
        if name == 'localhost' or name.startswith('127.'):
            return real(name.replace('localhost', '127.0.0.1'), port, *args, **kwargs)
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known: %s' % name)
    socket.getaddrinfo = fake
    try:
        yield
    finally:
        socket.getaddrinfo = real


OPENSSL_SETTINGS = """
[req]
distinguished_name = subject
prompt = no
[subject]
CN = stand-in
[server]
basicConstraints = critical, CA:TRUE
keyUsage = critical, digitalSignature, keyCertSign
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = IP:127.0.0.1, DNS:localhost, %s
"""


def certificate(folder, names):
    """Make a server certificate for the names, its own authority: (its path, `tls` of a stand-in).

    The test is skipped where there is no openssl."""
    settings, path = os.path.join(folder, 'openssl.cnf'), os.path.join(folder, 'stand-in.pem')
    with open(settings, 'w') as file:
        file.write(OPENSSL_SETTINGS % ', '.join('DNS:' + name for name in names))
    try:
        subprocess.run(['openssl'] + (
            'req -x509 -days 30 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes '
            '-extensions server').split() + ['-config', settings, '-keyout', path + '.key', '-out',
            path], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        raise unittest.SkipTest('no openssl here to make a certificate with') from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, path + '.key')
    return path, context


class Proxy(Loopback):
    """A proxy on the loopback interface that opens tunnels.

    `mapping` leads names to servers; other names get 502.  With a password, `user:secret`,
    a request without it gets 407.  `connections` counts what was passed on, `requests` as those of
    DataSpace."""

    def __init__(self, mapping, password=None):
        Loopback.__init__(self)
        self.ports = {name: server.port for name, server in mapping.items()}
        self.password, self.connections, self.requests = password, 0, []

    def serve(self, handler):
        handler.close_connection = True
        port = self.ports.get(handler.path.rpartition(':')[0])
        right = 'Basic ' + base64.b64encode((self.password or '').encode()).decode()
        with self.lock:
            self.requests.append((handler.command, handler.path, dict(handler.headers), b''))
        if self.password and handler.headers.get('Proxy-Authorization') != right:
            handler.send_error(407)
        elif port is None or handler.command != 'CONNECT':
            handler.send_error(502)
        else:
            with self.lock:
                self.connections += 1
            with socket.create_connection(('127.0.0.1', port), 30) as far:
                handler.wfile.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
                self.relay(handler.connection, far)

    def relay(self, near, far):
        other = {near: far, far: near}
        while not self.closing.is_set():
            for side in select.select([near, far], [], [], 0.05)[0]:
                data = side.recv(BLOCK)
                if not data:
                    return
                other[side].sendall(data)


ENVIRON = {"CDSE_USERNAME": "user", "CDSE_PASSWORD": "password"}
HERE = os.path.dirname(os.path.abspath(cso.__file__))
RC = os.path.join(HERE, "example.rc")
NAMES = ["%s.dataspace.copernicus.eu" % name
         for name in ("catalogue", "download", "zipper", "identity", "stac")]


class Case(unittest.TestCase):
    """A test with a folder of its own, quiet logs, and no proxy from the outside."""

    maxDiff = None

    def setUp(self):
        # a product that hangs ends the run with a traceback of its threads
        faulthandler.dump_traceback_later(100, exit=True, file=sys.__stderr__)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.waits = []
        quiet = logging.NullHandler()
        cso.log.addHandler(quiet)
        self.addCleanup(cso.log.removeHandler, quiet)
        clean = {name: value for name, value in os.environ.items()
                 if not name.upper().endswith("_PROXY") and not name.startswith(("CDSE_", "NETRC"))}
        self.use(mock.patch.dict(os.environ, dict(clean, HOME=self.folder), clear=True))

    def use(self, context):
        """Enter a context for the time of the test."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(context)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8", newline="") as out:
            out.write(text)
        return self.path(name)

    def read(self, *names):
        with open(self.path(*names), "rb") as data:
            return data.read()

    def files(self):
        """All files below the folder, as relative paths."""
        return sorted(os.path.relpath(os.path.join(top, name), self.folder)
                      for top, _, names in os.walk(self.folder) for name in names)

    def session(self, space, **options):
        """A Session for a stand-in: its waits are noted in self.waits, not waited."""
        options.setdefault("environ", dict(ENVIRON))
        options.setdefault("sleep", self.waits.append)
        return cso.Session(token_url=space.token_url, **options)

    def task(self, space, record, **known):
        """The Task that fetches a record into the folder; size and md5 only where given."""
        return cso.Task(space.href(record), self.path(record.name), **known)

    def run_main(self, *args):
        """Return (exit status, stdout, stderr) of a command line."""
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as err:
            status = cso.main(list(args))
        return status, out.getvalue(), err.getvalue()


def wait_until(happened, seconds=30):
    """Return when something has happened; an error after so long, so that no test hangs."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise AssertionError('waited %d seconds in vain' % seconds)
        time.sleep(0.005)


class StandInTest(unittest.TestCase):
    """The stand-in behaves as the service does, and its faults as their names say."""

    def ask(self, url, data=None, bearer=None, **headers):
        """Status, headers and body of one request that follows nothing."""
        if bearer:
            headers['Authorization'] = 'Bearer ' + bearer
        address = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(address.netloc, timeout=5)
        self.addCleanup(connection.close)
        headers = {name.replace('_', '-'): value for name, value in headers.items()}
        connection.request('POST' if data is not None else 'GET',
                           address._replace(scheme='', netloc='').geturl(), data, headers)
        with connection.getresponse() as response:
            return response.status, response.headers, response.read()

    def page(self, url, **query):
        """The JSON of a page; `_` in a name stands for the `$` of OData."""
        pairs = [(name.replace('_', '$'), value) for name, value in query.items()]
        url += '?' + urllib.parse.urlencode(pairs) if pairs else ''
        return json.loads(self.ask(url)[2].decode())

    def grant(self, space, **fields):
        fields = fields or {'grant_type': 'password', 'username': 'user', 'password': 'password'}
        body = urllib.parse.urlencode(dict(fields, client_id='cdse-public'))
        status, _, body = self.ask(space.token_url, body)
        return status, json.loads(body.decode())

    def login(self, space):
        return self.grant(space)[1]['access_token']

    # -- records

    def test_records(self):
        self.assertEqual(len({record.id for record in RECORDS}), len(RECORDS))
        self.assertLessEqual(set(TYPES_5P), {record.producttype for record in RECORDS})
        for record in RECORDS:
            with self.subTest(record.name):
                self.assertLessEqual(record.start, record.end)
                for outline in outlines(record.footprint):
                    west, south, east, north = bounding_box(outline)
                    self.assertTrue(-180 <= west <= east <= 180 and -90 <= south <= north <= 90)
        orbits = made_products(120000, step_seconds=60)
        self.assertEqual(len({orbits[n].name for n in range(0, 120000, 500)}), 240)
        self.assertEqual(orbits[119999].orbit, 3697 + 119999 - 100000)
        same = made_products(20, same_start=True, points=301)
        self.assertEqual([len({record[column] for record in same}) for column in (0, 1, 4)],
                         [20, 20, 1], 'ids, names, starts')
        self.assertEqual(len(same[0].footprint['coordinates'][0]), 301)

    def test_content_is_made_blockwise_and_differs_by_place(self):
        whole = body_of(RECORDS[0], 200000)
        self.assertEqual(whole[:8], HDF5)
        self.assertEqual(len({whole[k:k + 1000] for k in range(0, 200000, 1000)}), 200)
        self.assertEqual(b''.join(content_blocks(RECORDS[0], 200000, start=131000)), whole[131000:])
        self.assertNotEqual(body_of(RECORDS[0], 200000, version=1)[8:], whole[8:])

    # -- catalogues

    def test_filters_of_odata(self):
        kind = ("Attributes/OData.CSC.StringAttribute/any(att:att/Name eq 'productType' and "
                "att/OData.CSC.StringAttribute/Value eq '%s')")
        cases = [
            (kind % 'L2__NO2___', lambda r: r.producttype == 'L2__NO2___'),
            ("ContentDate/Start lt 2018-05-01 and ContentDate/End gt 2018-04-30T18:00:00.000Z",
             lambda r: r.start < '2018-05-01' and r.end > '2018-04-30T18'),
            ("Collection/Name eq 'SENTINEL-5P' and (%s or %s)" % (
                kind % 'L2__CH4___', kind % 'L2__HCHO__'),
             lambda r: r.producttype in ('L2__CH4___', 'L2__HCHO__')),
            ("OData.CSC.Intersects(area=geography'SRID=4326;POLYGON((0 40,9 40,9 50,0 50,0 40))')",
             lambda r: meets_box(r.footprint, (0, 40, 9, 50)))]
        with DataSpace() as space:
            for text, test in cases:
                with self.subTest(text):
                    page = self.page(space.odata + '/Products', _filter=text, _top=1000,
                                     _orderby='ContentDate/Start asc')
                    expected = sorted((r.start, r.id) for r in RECORDS if test(r))
                    self.assertTrue(expected)
                    self.assertEqual([(p['ContentDate']['Start'], p['Id']) for p in page['value']],
                                     expected)

    def test_what_catalogues_refuse(self):
        resto = '/resto/api/collections/Sentinel5P/search.json?'
        with DataSpace() as space:
            for status, path in (
                    (400, "/odata/v1/Products?$filter=Collection/Name+eq+'Sentinel5P'"),
                    (400, '/odata/v1/Products?top=5'), (400, '/odata/v1/Products?$orderby=Size'),
                    (400, "/odata/v1/Products?$filter=Nam+eq+'x'"),
                    (400, '/odata/v1/Products?$filter=ContentDate/Start+gt+now'),
                    (400, '/odata/v1/Products?$select=Nam'), (422, '/odata/v1/Products?$top=1001'),
                    (422, '/odata/v1/Products?$skip=10001'), (422, '/odata/v1/Products?$top=x'),
                    (404, '/odata/v1/Products(%s)' % ('x' * 36)), (400, resto + 'maxRecords=2001'),
                    (400, resto + 'page=502'), (400, resto + 'productsType=x'),
                    (404, resto.replace('5P', '9')), (400, '/v1/search?sortby=size')):
                with self.subTest(path):
                    self.assertEqual(self.ask(space.url + path)[0], status)
            detail = self.page(space.odata + '/Products', _skip=10001)['detail'][0]
            self.assertEqual((detail['input'], detail['ctx']), ('10001', {'le': 10000}))

    def test_next_link_ends_at_the_wall(self):
        with DataSpace(made_products(12000), content_size=8) as space:
            url, rows = space.odata + '/Products?$top=1000&$orderby=ContentDate/Start', 0
            url += '&$select=Name'
            while url:
                page = self.page(url)
                rows, url = rows + len(page['value']), page.get('@odata.nextLink')
            self.assertEqual(rows, 11000)
            self.assertEqual(sorted(page['value'][0]), ['Id', 'Name'])

    def test_opensearch(self):
        """Its links, and its meaning of a period: what lies within."""
        with DataSpace() as space:
            url = space.opensearch + '/collections/SENTINEL-5P/search.json'
            page = self.page(url, productType='L2__NO2___', maxRecords=2, sortParam='startDate')
            links = {link['rel']: link['href'] for link in page['properties']['links']}
            names = [feature['properties']['title']
                     for feature in page['features'] + self.page(links['next'])['features']]
            self.assertEqual(sorted(names), sorted(
                r.name for r in RECORDS if r.producttype == 'L2__NO2___'))
            record = next(r for r in RECORDS if r.producttype == 'L2__SO2___')
            for start, count in ((record.start, 1), (record.start.replace('0Z', '1Z'), 0)):
                page = self.page(url, productType='L2__SO2___', startDate=start,
                                 completionDate=record.end)
                self.assertEqual(len(page['features']), count)

    def test_stac(self):
        """Pages by GET and by POST; a box over the date line is read the long way round."""
        search = {'collections': ['sentinel-5p-l2-o3-tcl-offl'], 'limit': 1,
                  'datetime': '2018-05-01T00:00:00Z/2018-05-02T00:00:00Z', 'bbox': [0, -5, 9, 5],
                  'filter': {'op': '=', 'args': [{'property': 'product:type'}, 'L2__O3_TCL']},
                  'fields': '-properties.datetime'}
        ids = []
        with DataSpace() as space:
            while search:
                body = json.dumps(search).encode()
                page = json.loads(self.ask(space.stac + '/search', body)[2].decode())
                ids += [item['id'] for item in page['features']]
                self.assertNotIn('datetime', page['features'][0]['properties'])
                search = next((link['body'] for link in page['links']
                               if link['rel'] == 'next'), None)
            self.assertEqual([id[:19] for id in ids], ['S5P_OFFL_L2__O3_TCL'] * 2)
            page = self.page(space.stac + '/search', collections='sentinel-5p-l2-no2-nrti', limit=2)
            items = page['features'] + self.page(page['links'][-1]['href'])['features']
            self.assertEqual([item['id'][9:19] for item in items], ['L2__NO2___'] * 3)
            asset = items[0]['assets']['netcdf']
            uuid = re.search(r'Products\(([^)]*)\)', asset['alternate']['https']['href']).group(1)
            self.assertEqual(asset['file:checksum'], 'd50110' + space.md5(space.find(uuid)))
            found = [len(self.page(space.stac + '/search', collections='sentinel-5p-l2-co-nrti',
                                   bbox=box, limit=100)['features'])
                     for box in ('170,-90,-170,90', '-170,-90,170,90')]
            self.assertEqual(found[0], found[1])
            known = {one['id'] for one in self.page(space.stac + '/collections',
                                                    limit=200)['collections']}
            self.assertGreaterEqual(known, {'sentinel-5p-l1-ra-bd5-nrti', 'sentinel-1-grd'})

    # -- tokens and downloads

    def test_tokens(self):
        now = [0]
        with DataSpace(clock=lambda: now[0], expires_in=600, totp='123456') as space:
            self.assertEqual(self.grant(space)[0], 401)
            right = dict(grant_type='password', username='user', password='password', totp='123456')
            status, first = self.grant(space, **right)
            self.assertEqual((status, first['expires_in'], space.logins), (200, 600, 1))
            href = space.href(RECORDS[0])
            self.assertEqual(self.ask(href, bearer=first['access_token'])[0], 200)
            for bearer, code in ((None, b'604'), ('sh-1', b'609'), ('x', b'109')):
                status, _, body = self.ask(href, bearer=bearer)
                self.assertEqual((status, code in body), (401, True))
            now[0] = 600
            self.assertEqual(self.ask(href, bearer=first['access_token'])[0], 401)
            renewal = dict(grant_type='refresh_token', refresh_token=first['refresh_token'])
            status, second = self.grant(space, **renewal)
            self.assertEqual((status, space.refreshes), (200, 1))
            self.assertEqual(self.ask(href, bearer=second['access_token'])[0], 200)
            self.assertEqual(self.grant(space, **renewal)[0], 400)
            space.revoke_tokens()
            self.assertEqual(self.ask(href, bearer=second['access_token'])[0], 401)

    def test_ranges(self):
        body = body_of(RECORDS[0])
        with DataSpace() as space:
            bearer, href = self.login(space), space.href(RECORDS[0])
            etag = self.ask(href, bearer=bearer)[1]['ETag']
            for text, tag, status, part in (
                    ('bytes=5-9', etag, 206, body[5:10]), ('bytes=9-99999', etag, 206, body[9:]),
                    ('bytes=-10', etag, 206, body[-10:]), ('lines=1-2', etag, 200, body),
                    ('bytes=5-', '"x"', 200, body)):
                with self.subTest(text):
                    answer = self.ask(href, bearer=bearer, Range=text, If_Range=tag)
                    self.assertEqual((answer[0], answer[2]), (status, part))
            answer = self.ask(href, bearer=bearer, Range='bytes=20000-')
            self.assertEqual((answer[0], answer[1]['Content-Range']), (416, 'bytes */20000'))
            quoted = '%s/Products(%%27%s%%27)/$value' % (space.odata, RECORDS[0].id)
            self.assertEqual(self.ask(quoted, bearer=bearer)[0], 422)

    def test_at_most_so_many_transfers(self):
        with DataSpace(max_transfers=2, content_size=20000000) as space:
            bearer, href = self.login(space), space.href(RECORDS[0])
            held = []
            for _ in range(3):          # nothing is read, so the transfers stay open
                connection = http.client.HTTPConnection('127.0.0.1', space.port, timeout=5)
                self.addCleanup(connection.close)
                connection.request('GET', urllib.parse.urlsplit(href).path,
                                   headers={'Authorization': 'Bearer ' + bearer})
                held.append(connection.getresponse())
                self.addCleanup(held[-1].close)
            self.assertEqual([response.status for response in held], [200, 200, 429])
            self.assertEqual(space.peak_transfers, 2)
            self.assertEqual(held[0].read(), space.body(RECORDS[0]))
            self.assertEqual(self.ask(href, bearer=bearer, Range='bytes=0-9')[0], 206)

    # -- faults

    def outcome(self, space, bearer, **headers):
        """What a client meets: a status and the number of bytes, or the name of an error."""
        try:
            status, _, body = self.ask(space.href(RECORDS[0]), bearer=bearer, **headers)
        except http.client.IncompleteRead as error:
            return 'short', len(error.partial)
        except ConnectionError:
            return 'dropped', 0
        return status, len(body) if body != space.body(RECORDS[0]) else 'right'

    def test_faults_of_downloads(self):
        for kind, expected in (
                ('fin', ('short', 10000)), ('cut', (200, 10000)), ('chunked', ('short', 10000)),
                ('chunked-ok', (200, 'right')), ('flip', (200, 20000)), ('empty', (200, 0)),
                ('no-length', (200, 'right')), ('drop', ('dropped', 0)),
                ('changed', (200, 'right')), ('trickle', (200, 'right'))):
            with self.subTest(kind), DataSpace() as space:
                bearer, old = self.login(space), space.body(RECORDS[0])
                space.faults.add(kind, every=0)
                self.assertEqual(self.outcome(space, bearer), expected)
                self.assertEqual(self.outcome(space, bearer), (200, 'right'))
                self.assertEqual(space.body(RECORDS[0]) != old, kind == 'changed')
        with DataSpace() as space:
            bearer = self.login(space)
            space.faults.add('rst', at=0)
            self.assertIn(self.outcome(space, bearer), [('dropped', 0), ('short', 0)])
            for kind, start in (('html', b'<!DOCTYPE html>'), ('json', b'{"code"'), ('zip', ZIP)):
                space.faults.add(kind)
                status, _, body = self.ask(space.href(RECORDS[0]), bearer=bearer)
                self.assertEqual((status, body[:len(start)]), (200, start))

    def test_faults_of_ranges_and_headers(self):
        with DataSpace() as space:
            bearer, body, href = self.login(space), body_of(RECORDS[0]), space.href(RECORDS[0])
            for kind, status, part in (('ignore-range', 200, body), ('416', 416, None),
                                       ('wrong-range', 206, body[150:])):
                with self.subTest(kind):
                    space.faults.add(kind)
                    self.assertEqual(self.outcome(space, bearer), (200, 'right'))
                    answer = self.ask(href, bearer=bearer, Range='bytes=50-')
                    self.assertEqual(answer[0], status)
                    self.assertIn(answer[2] if part else None, (part,))
            space.faults.add('redirect', to='/elsewhere{target}', status=307)
            answer = self.ask(href, bearer=bearer)
            self.assertEqual((answer[0], answer[1]['Location'][:20]), (307, '/elsewhere/odata/v1/'))
            space.faults.add('429', retry_after='date')
            self.assertIn('GMT', self.ask(href, bearer=bearer)[1]['Retry-After'])
            space.faults.add('503', after=1, times=2, name=RECORDS[0].id)
            self.assertEqual([self.outcome(space, bearer)[0] for _ in range(5)],
                             [200, 503, 503, 200, 200])

    def test_faults_of_pages(self):
        with DataSpace() as space:
            url = space.odata + '/Products?$top=4'

            def ids(page):
                return [product['Id'] for product in page['value']]
            whole = ids(self.page(url))
            space.faults.add('empty-page', on='odata')
            page = self.page(url)
            self.assertEqual((ids(page), ids(self.page(page['@odata.nextLink']))), ([], whole))
            space.faults.add('short-page', on='odata')
            first = self.page(url)
            self.assertEqual((ids(first) + ids(self.page(first['@odata.nextLink'])))[:4], whole)
            space.faults.add('repeat', on='odata', times=None)
            for _ in range(3):
                page = self.page(url)
                self.assertEqual(ids(page), whole)
                url = page['@odata.nextLink']

    # -- names, certificates, proxies

    def test_names_stay_on_this_machine(self):
        with DataSpace() as space, names_on_loopback({'catalogue.example.eu': space}):
            page = self.page('http://catalogue.example.eu/odata/v1/Products?$top=1')
            self.assertIn('http://catalogue.example.eu/odata/', page['@odata.nextLink'])
            with self.assertRaises(OSError):
                self.ask('http://another.example.eu/')


class ExpressionTest(unittest.TestCase):
    """The part of Python that #if, $(( )), typed values and `selection` may use, and no more."""

    def value(self, text, names={}):
        return cso.evaluate(cso.parse_expression(text), names)

    def refuse(self, text, said=".", names={}):
        with self.assertRaisesRegex(ValueError, said, msg=text[:80]):
            self.value(text, names)

    def test_values(self):
        for text, expected in (
                ("1 + 2 * 3", 7), ("7 / 2", 3.5), ("7 // 2", 3), ("-7 % 3", 2), ("2 ** 10", 1024),
                ("2 ** -1", 0.5), ("'x' * 10000", "x" * 10000), ("1.5 ** 100", 1.5 ** 100),
                ("+1 - -1", 2), ("0o775", 509), ("'a' + \"b\"", "ab"), ("'ab' * 3", "ababab"),
                ("2 * 'ab'", "abab"), ("1 < 2 <= 2", True), ("1 < 2 > 2", False),
                ("1 < 3 < 2", False), ("'b' in 'abc'", True), ("3 not in [1, 2]", True),
                ("None is None", True), ("'a' != 'b'", True),
                ("not 0", True), ("1 and 0 or 'x'", "x"), ("'a' if 0 else 'b'", "b"),
                ("[1, (2, 3)]", [1, (2, 3)]), ("{'a': 1}", {"a": 1}), ("{1, 2}", {1, 2}),
                ("()", ()), ("'abc'[1]", "b"), ("'abc'[1:]", "bc"), ("'abc'[::-1]", "cba"),
                ("{'a': 5}['a']", 5), ("int('12') + float('0.5')", 12.5), ("str(1) + 'a'", "1a"),
                ("bool('')", False), ("len('abc')", 3), ("min(3, 1)", 1), ("max([1, 3])", 3),
                ("abs(-2)", 2), ("round(2.567, 1)", 2.6), ("round(2.5)", 2), ("sum([1, 2, 3])", 6),
                ("'NO2'.lower()", "no2"), ("' a '.strip().upper()", "A"),
                ("'a,b'.split(',')", ["a", "b"]), ("'S5P'.startswith('S5')", True),
                ("'a.nc'.endswith('.nc')", True), ("'a-b'.replace('-', '+')", "a+b"),
                ("  (1)  ", 1), ("1 in [1,\n 2]", True),
                # only what decides is evaluated
                ("1 or 1/0", 1), ("0 and 1/0", 0), ("1 if 1 else 1/0", 1), ("'' or 0 or 'z'", "z"),
                ("1 and '' and 1/0", "")):
            with self.subTest(text):
                result = self.value(text)
                self.assertEqual((result, type(result)), (expected, type(expected)))

    def test_names(self):
        row = {"processing": "RPRO", "orbit": "02818", "len": "hides the function"}
        self.assertIs(self.value("processing in ['RPRO', 'OFFL'] and orbit[0] == '0'", row), True)
        self.assertEqual(self.value("len", row), "hides the function")
        self.refuse("procesing == 'RPRO'", "processing", row)
        self.refuse("T == 1", "T ")

    def test_refused(self):
        for text in (
                # no expression, or not allowed
                "", "   ", "#", "1 = 1", "x = 1", "1;2", "1\n2", "import os", "(", ")", "'a", "1 2",
                "$x", "1 and", "007", "a if b", "lambda: 1", "[x for x in [1]]", "{x for x in [1]}",
                "(x for x in 'a')", "{x: 1 for x in 'a'}", "(x := 1)", "(yield)", "(yield 1)",
                "(await x)", "f'{1}'", "f'a'", "*[1]", "[*[1]]", "{**{}}", "{'a': 1, **{}}",
                "max(*[1, 2])", "int('1', base=2)", "int(**{})", "print(1)", "open('/etc/passwd')",
                "eval('1')", "__import__('os')", "().__class__", "'a'.format(1)", "'a'.join('b')",
                "'a'.encode()", "'a'.upper", "int", "'a'.__class__", "[].append(1)", "max.__self__",
                "'%s' % 1", "'%9999d' % 1", "1 << 2", "1 | 2", "1 & 2", "1 ^ 2", "~1", "1 @ 2",
                "\0", "'\0'", "\udcff", "'a" + "\udcff'",
                # values that go wrong
                "1/0", "1 // 0", "0 ** -1", "1 % 0", "2.0 ** 1e10", "10 ** 400 / 3", "int(1e309)",
                "int('x')", "int('1', 99)", "float('x')", "'a' + 1", "-'a'", "[] < 1", "1 in 1",
                "[1][5]", "{}['a']", "{[]: 1}", "{[1]}", "{{}: 1}", "{}[[]]", "'abc'[::0]",
                "'abc'['a']", "1[0]", "None[0]", "len(1)", "max()", "max([])", "max('a', 1)",
                "sum('abc')", "sum(['a'])", "sum(1)", "round('x')", "abs('x')", "'a'.split('')",
                "'a'.replace('b')", "'a'.upper(1)", "1 .upper()", "'a'()", "1()", "nosuch",
                # nothing grows without bound
                "9 ** 9 ** 9", "10 ** 10 ** 10", "2 ** 99999", "'x' * 10 ** 15", "10 ** 15 * 'x'",
                "[0] * 10 ** 9", "[[0] * 999] * 999", "'x' * 9999 + 'x' * 9999",
                "('x' * 9999).replace('x', 'y' * 9999)",
                "''.replace('', 'x' * 9999).replace('x', 'yy')", "int('9' * 9999)",
                "*".join(["2 ** 9999"] * 9), "str([" * 40 + "'\\\\'" + "])" * 40,
                "round(1, -10 ** 6)", "9" * 9999, "0x" + "f" * 9000, "'x'" * 5000,
                "1 +" * 4000 + "1", "sum([" + "('x' * 999).split('x')," * 99 + "], [])"):
            with self.subTest(text[:60]):
                self.refuse(text)

    def test_nesting_ends_in_an_error_or_a_value(self):
        """Whatever parser a Python has: no other exception, no crash."""
        for piece, core, close in (
                ("(", "1", ")"), ("[", "1", "]"), ("{1:", "1", "}"), ("-", "1", ""),
                ("not ", "1", ""), ("~", "1", ""), ("1 + ", "1", ""), ("2 ** ", "1", ""),
                ("1 if 1 else ", "1", ""), ("lambda:", "1", ""), ("str(", "1", ")"),
                ("-(", "1", ")"), ("await ", "1", ""), ("", "'a'", ".upper()"), ("", "x", "[0]"),
                ("(", "", ""), ("1 < ", "1", "")):
            for depth in (20, 95, 250, 5000):
                text = piece * depth + core + close * depth
                with self.subTest(piece + core + close, depth=depth):
                    try:
                        self.value(text)
                    except ValueError as error:
                        self.assertTrue(str(error))


class SettingsCase(Case):
    """Has settings files in a folder of its own, which is the current directory as well."""

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.folder = os.getcwd()

    def settings(self, text, files={}, env={}, environ={}, name="main.rc"):
        for other, content in dict(files, **{name: text}).items():
            os.makedirs(os.path.dirname(self.path(other)), exist_ok=True)
            with open(self.path(other), "wb") as out:
                out.write(content if isinstance(content, bytes) else content.encode("utf-8"))
        return cso.read_settings(name, env, environ)

    def values(self, *args, **options):
        settings = self.settings(*args, **options)
        return {key: settings.get(key, "str") for key in settings.keys()}

    def refuse(self, text, *pieces, **options):
        """The error of a file; its text has all pieces."""
        with self.assertRaises(cso.SettingsError, msg=text[:80]) as caught:
            self.settings(text, **options)
        for piece in pieces:
            self.assertIn(piece, str(caught.exception))
        return caught.exception

    def check(self, table, **options):
        for text, expected in table:
            with self.subTest(text):
                self.assertEqual(self.values(text, **options), expected)


class SettingsTest(SettingsCase):
    """The rc format, rule by rule; then its errors, hostile files, and the command."""

    def test_key_and_value(self):
        self.check((
            ("url : https://x.y:8080/z?a=b;c", {"url": "https://x.y:8080/z?a=b;c"}),
            ("k:v\nl :  w \n\tm\t:\tx\t", {"k": "v", "l": "w", "m": "x"}),
            ("a b-*/c : 1\n*.x : 2\n[s] : 3", {"a b-*/c": "1", "*.x": "2", "[s]": "3"}),
            ("empty :\n : nokey", {"empty": "", "": "nokey"}),
            ("Key : 1\nkey : 2", {"Key": "1", "key": "2"}),
            ("q : \"it's\" [1] %Y%(m)s%{x} ; # =", {"q": "\"it's\" [1] %Y%(m)s%{x} ; # ="}),
            ("    deep : 1\n  other : 2", {"deep": "1", "other": "2"}), (" #x : 1", {"#x": "1"}),
            ("", {}), ("\n \n! only : this\n", {})))

    def test_comments(self):
        self.check((
            ("!a : 1\n  ! b : 2\n!! c : ${nosuch} !\nd : 4", {"d": "4"}),
            ("a : 1 ! note", {"a": "1"}), ("a : x!y", {"a": "x"}), ("a : !", {"a": ""}),
            ("a : 1 ! one ! two ! three", {"a": "1"}), ("a : 1 ! ${nosuch} $(( ", {"a": "1"}),
            ("a : hi \\! there", {"a": "hi ! there"}), ("a!b : 1", {"a!b": "1"})))
        self.assertEqual(self.values("a : ${P}\nb : ${a} z", environ={"P": "pa!ss"}),
                         {"a": "pa!ss", "b": "pa!ss z"}, "a value never starts a comment")

    def test_continuations(self):
        self.check((
            ("a : x \\\n   y\\  \n  z\nb : 1", {"a": "x y z", "b": "1"}),
            ("a : x \\\\\\\n y", {"a": "x y"}), ("a : x \\\n  \\\n  y", {"a": "x y"}),
            ("a : \\\n  v", {"a": "v"}), ("! c \\\nb : 1\nc : 2", {"c": "2"}),
            ("a : 1 \\\n ! note \\\n 2\nb : 3", {"a": "1", "b": "3"}),
            ("a : x \\\n\nb : 1", {"a": "x", "b": "1"}), ("a : x \\", {"a": "x"}),
            ("#if \"b\" in [\"a\",\\\n  \"b\"]\nk : 1\n#endif", {"k": "1"})))

    def test_encodings_and_line_ends(self):
        for data, expected in (
                ("a : é\n".encode("utf-8"), {"a": "é"}),
                ("\ufeffa : 1".encode("utf-8"), {"a": "1"}),
                ("é : ü\n".encode("latin-1"), {"é": "ü"}), (b"a : \x80", {"a": "\x80"}),
                ("日本 : 語\n".encode("utf-8"), {"日本": "語"}),
                (b"a : 1\r\nb : 2 \\\r\n 3\r\n", {"a": "1", "b": "2 3"}),
                (b"a : 1\rb : 2\r", {"a": "1", "b": "2"}),
                (b"\xef\xbb\xbf#if 1\na : 1\n#endif", {"a": "1"})):
            with self.subTest(data):
                self.assertEqual(self.values(data), expected)
        self.refuse("a : 1\nb : 2\n".encode("utf-16"), "main.rc:1", "UTF-8")
        self.refuse(b"a : 1\n\nb : \0", "main.rc:3")

    def test_variables(self):
        self.check((
            ("x : ${y}/${y}\ny : ${z}\nz : 1", {"x": "1/1", "y": "1", "z": "1"}),
            ("in.${g} : 1\ng : no2", {"in.no2": "1", "g": "no2"}),
            ("a.b-c_1 : v\nx : ${a.b-c_1}", {"a.b-c_1": "v", "x": "v"}),
            ("x : ${a*b} ${a b} ${} $HOME $(y) $filter %{z}",
             {"x": "${a*b} ${a b} ${} $HOME $(y) $filter %{z}"}),
            ("e :\nx : [${e}]", {"e": "", "x": "[]"}),
            ("a : C:\\new\nx : ${a}", {"a": "C:\\new", "x": "C:\\new"})))

    def test_variables_from_outside(self):
        text = "A : key\nx : ${A}"
        for env, environ, expected in (
                ({}, {}, "key"), ({}, {"A": "os"}, "os"), ({"A": "env"}, {"A": "os"}, "env"),
                ({"A": 5}, {}, "5"), ({"A": pathlib.PurePosixPath("/d")}, {}, "/d"),
                ({}, {"A": "${B} !"}, "${B} !"), ({}, {"A": "a:b"}, "a:b")):
            with self.subTest(env=env, environ=environ):
                self.assertEqual(self.values(text, env=env, environ=environ),
                                 {"A": "key", "x": expected})
        self.assertEqual(self.values("${K} : 1", env={"K": "a:b"}), {"a": "b : 1"},
                         "split after substitution")
        self.assertEqual(self.values("PATH : /me:${PATH}", environ={"PATH": "/os"}),
                         {"PATH": "/me:/os"})
        self.assertNotIn("A", self.settings("x : ${A}", env={"A": 1}))
        with mock.patch.dict(os.environ, {"RC_TEST": "shell"}):
            self.write("e.rc", "x : ${RC_TEST}")
            self.assertEqual(cso.read_settings("e.rc").get("x"), "shell")

    def test_special_variables(self):
        with mock.patch.object(sys, "argv", ["/bin/tool.py"]):
            self.check((
                ("x : ${script} ${pid}", {"x": "tool %d" % os.getpid()}),
                ("x : ${pwd}", {"x": os.getcwd()}),
                ("x : ${hostname}", {"x": socket.gethostname()}),
                ("x : ${script}\nscript : mine", {"x": "mine", "script": "mine"})))

    def test_conditions(self):
        self.check((
            ("n : 2\n#if ${n} == 1\na : 1\n#elif ${n} == 2 :\na : 2\n#else\na : 3\n#endif",
             {"n": "2", "a": "2"}),
            ("#if \"${s}\" in [\"T\",\"True\"]\na : 1\n#else\na : 0\n#endif\ns : F",
             {"s": "F", "a": "0"}),
            ("#if 0\n#if 1\na : 1\n#endif\n#else any text\n#if 1\nb : 1\n#endif\n#endif too",
             {"b": "1"}),
            ("#if 1\n#if 0\na : 1\n#else\nb : 1\n#endif\n#else\nc : 1\n#endif", {"b": "1"}),
            ("#if 1\na : 1\n#elif ${nosuch}\n#endif", {"a": "1"}),
            ("#if 0\nno colon\n#error no\n#include no\n#nonsense\na : ${no}\n#endif\na : 1",
             {"a": "1"}),
            ("#if 1\nn : 1\n#endif\n#if ${n}\na : 1\n#endif", {"n": "1", "a": "1"})))

    def test_loops(self):
        self.check((
            ("#for X in a b\nk.X : v X\n#endfor", {"k.a": "v a", "k.b": "v b"}),
            ("#for X in ${l} :\nk.X : 1\n#endfor\nl : p, q",
             {"k.p,": "1", "k.q": "1", "l": "p, q"}),
            ("#for N in 1\nNO2 : N\n#endfor", {"1O2": "1"}),
            ("#for X in a b\n#for Y in 1 2\nX.Y : 1\n#endfor\n#endfor",
             {"a.1": "1", "a.2": "1", "b.1": "1", "b.2": "1"}),
            ("#for X in a b\n#if 'X' == 'a'\nX : ${v.X}\n#endif\n#endfor\nv.a : 5",
             {"a": "5", "v.a": "5"}),
            ("#for X in\nX : 1\n#endfor\nz : 1", {"z": "1"})))

    def test_sums(self):
        self.check((
            ("a : $(( ${n} * 2 + 1 ))\nn : 4", {"a": "9", "n": "4"}),
            ("k.$(( 1+1 )) : v", {"k.2": "v"}),
            ("a : $((int('7'))) of $(( max(1, (2)) )) (x)", {"a": "7 of 2 (x)"}),
            ("a : $(( 7 / 2 ))", {"a": "3.5"}),
            ("a : $(( '$' ))${n}\nn : 1", {"a": "$1", "n": "1"}),
            ("a : $(( '$' )){n} $(( 'n' ))", {"a": "${n} n"})))

    def test_included_files(self):
        files = {
            "cfg/one.rc": "one : 1\n#include ./two.rc", "cfg/two.rc": "two : ${one}",
            "cfg/my file.rc": "f : 1", "cfg/sub/up.rc": "#include ../two.rc",
            "cfg/sub/near.rc": "#include other.rc", "cfg/sub/other.rc": "o : near",
            "cfg/other.rc": "o : of the main file", "cfg/sub/far.rc": "#include last.rc",
            "clash.rc": "c : current", "cfg/clash.rc": "c : beside", "cfg/last.rc": "l : 1"}
        for text, expected in (
                ("#include cfg/one.rc", {"one": "1", "two": "1"}),
                ("#include one.rc", {"one": "1", "two": "1"}),
                ("#include ./one.rc", {"one": "1", "two": "1"}),
                ("#include\t%s" % self.path("cfg", "one.rc"), {"one": "1", "two": "1"}),
                ("#include my file.rc", {"f": "1"}),
                ("#include ${n}.rc\nn : last", {"l": "1", "n": "last"}),
                ("one : 5\n#include sub/up.rc", {"one": "5", "two": "5"}),
                ("#include sub/near.rc", {"o": "near"}), ("#include sub/far.rc", {"l": "1"}),
                ("#include clash.rc", {"c": "current"}),
                ("#include ./clash.rc", {"c": "beside"}),
                ("#for X in last\n#include X.rc\n#endfor", {"l": "1"})):
            with self.subTest(text):
                self.assertEqual(self.values(text, files=files, name="cfg/main.rc"), expected)

    def test_imported_keys(self):
        files = {"o.rc": "a : ${E}\nb : T\nc : 3"}
        for text, expected in (
                ("#from o.rc import a b", {"a": "x", "b": "T"}),
                ("#from ./o.rc import c as d", {"d": "3"}),
                ("#from ${n}.rc import c\nn : o", {"c": "3", "n": "o"}),
                ("#from o.rc import c\nx : ${c}", {"c": "3", "x": "3"})):
            with self.subTest(text):
                self.assertEqual(self.values(text, files=files, environ={"E": "x"}), expected)

    def test_types(self):
        noon = datetime.datetime(2018, 7, 1, 12)
        for text, totype, expected in (
                ("T", "str", "T"), ("x y", "", "x y"), ("yes", "", "yes"), ("", "str", ""),
                ("T", "bool", True), ("True", "bool", True), ("yes", "bool", True),
                ("1", "bool", True), ("F", "bool", False), ("False", "bool", False),
                ("no", "bool", False), ("0", "bool", False), ("42", "int", 42),
                ("0o775", "int", 509), ("3.7", "int", 3), ("1.5e3", "int", 1500), ("2*3", "int", 6),
                ("", "int", 0), ("True", "int", 1), ("", "float", 0.0), ("1", "float", 1.0),
                ("-5", "float", -5.0), ("[1, 'a']", "list", [1, "a"]), ("", "list", []),
                ("(1, 2)", "list", [1, 2]), ("{'a': 1}", "dict", {"a": 1}),
                ("2018-07-01", "datetime", datetime.datetime(2018, 7, 1)),
                ("2018-07-01 12:00", "datetime", noon), ("2018/07/01 12:00:00", "datetime", noon),
                ("2018 7 1 12", "datetime", noon), ("2018-07-01T12:00:00Z", "datetime", noon),
                ("2018-07-01T12:00", "datetime", noon),
                ("2018-07-01 12:00:00:5", "datetime", noon.replace(microsecond=5))):
            with self.subTest(text, totype=totype):
                result = self.settings("k : " + text).get("k", totype)
                self.assertEqual((result, type(result)), (expected, type(expected)))

    def test_values_that_are_not_of_the_type(self):
        for text, totype in (
                ("T", ""), ("False", ""), ("true", "bool"), ("TRUE", "bool"), ("on", "bool"),
                ("Y", "bool"), ("", "bool"), ("007", "int"), ("x", "int"), ("None", "int"),
                ("1e309", "int"), ("nan", "float"), ("1 2", "float"), ("[1", "list"), ("5", "list"),
                ("[1]", "dict"), ("{[]: 1}", "dict"), ("__import__('os')", "list"),
                ("2018-07", "datetime"), ("20180701", "datetime"), ("", "datetime"),
                ("2018-07-01 24:00", "datetime"), ("2018-13-01", "datetime"),
                ("2018-07-01 00:00:00.5", "datetime"), ("%s-1-1" % ("9" * 5000), "datetime"),
                ("1", "complex")):
            with self.subTest(text[:30], totype=totype):
                settings = self.settings("\nk : " + text)
                with self.assertRaises(cso.SettingsError) as caught:
                    settings.get("k", totype, "a default does not help")
                error = caught.exception
                self.assertEqual((error.filename, error.lineno), ("main.rc", 2))
                self.assertIn("main.rc:2: k", str(error))
                self.assertIn(repr(text)[:100], str(error))

    def test_absent_keys(self):
        settings = self.settings("timerange.start : 1")
        for default in ("as it is", 0, "", False, []):
            self.assertIs(settings.get("other", "int", default), default)
        with self.assertRaises(cso.SettingsError) as caught:
            settings.get("timerange.strat")
        for piece in ("main.rc", "'timerange.strat'", "timerange.start"):
            self.assertIn(piece, str(caught.exception))

    def test_places(self):
        settings = self.settings("#include ./sub.rc\nb : \\\n 1\n#for X in p q\nX : ${b}\n#endfor",
                                 {"sub.rc": "\n\nc : ${b}"})
        self.assertEqual({key: settings.place(key) for key in settings.keys()},
                         {"b": "main.rc:2", "c": "sub.rc:3", "p": "main.rc:5", "q": "main.rc:5"})
        self.assertEqual(settings.keys()[:3], ["b", "p", "q"], "in the order of the file")
        settings.set("b", "x", "--set b")
        with self.assertRaisesRegex(cso.SettingsError, "^--set b: "):
            settings.get("b", "int")

    def test_errors_tell_file_and_line_and_what_was_expected(self):
        files = {
            "sub.rc": "! 1\n\nb : 1\nno colon", "twice.rc": "\nb : 2", "key.rc": "colour : red",
            "loop.rc": "\n#include main.rc"}
        for text, *pieces in (
                ("a : 1\nno colon here", "main.rc:2", "no colon here", "key : value"),
                ("[section]\n", "main.rc:1", "[section]"),
                ("a : 1\n\nb : x \\\n y\na : 1", "main.rc:5", "'a'", "main.rc:1"),
                ("b : 1\n#include twice.rc", "twice.rc:2", "'b'", "main.rc:1"),
                ("#for X in 1 2\nk : X\n#endfor", "main.rc:2", "'k'"),
                ("a : 1\n#include sub.rc", "sub.rc:4", "no colon"),
                ("\nx : ${colr}\ncolor : red", "main.rc:2", "${colr}", "color"),
                ("a : ${b}\nb : ${c}\nc : ${a}", "main.rc:", "needs itself"),
                ("a : ${a}", "main.rc:1", "${a}", "needs itself"),
                ("a : ${b}\nb : ${a}\nc : ${nosuch}", "main.rc:3", "${nosuch}"),
                ("x : ${y}\n#if ${nosuch}\ny : 1\n#endif", "main.rc:2", "${nosuch}"),
                ("# note", "main.rc:1", "# note", "#include", "!"),
                ("#ifdef X\n#endif", "main.rc:1", "#ifdef"),
                ("#warning x", "main.rc:1", "#warning"), ("####", "main.rc:1"),
                ("a : 1\n#if 1\n#if 1\n#endif", "main.rc:2", "#endif"),
                ("\n#endif", "main.rc:2", "#endif"), ("#else", "main.rc:1", "#else"),
                ("#for i in 1\n#else\na : 1\n#endfor", "main.rc:2", "#else"),
                ("#if 1\n#endfor", "main.rc:2", "#endif"),
                ("#for X in a\nX : 1", "main.rc:1", "#endfor"),
                ("#for X a b\n#endfor", "main.rc:1", "#for NAME in"),
                ("#for\n#endfor", "main.rc:1"),
                ("#if ${s} == x\n#endif\ns : y", "main.rc:1", "y", "quotes"),
                ("#if 1 = 1\n#endif", "main.rc:1", "1 = 1"), ("#if 1 ! note\n#endif", "main.rc:1"),
                ("#if\n#endif", "main.rc:1"), ("#if 0\n#elif 1/0\n#endif", "main.rc:2", "1/0"),
                ("a : $(( os.getcwd() ))", "main.rc:1", "os.getcwd()"),
                ("\na : $(( 1 + 1", "main.rc:2", "))"), ("a : $(( 1 ) )", "main.rc:1"),
                ("\n#error use ${v}\\n\\tor b\nv : a", "main.rc:2", "use a\n    or b"),
                ("a : 1\n#from key.rc import color", "main.rc:2", "'color'", "colour"),
                ("#from key.rc", "main.rc:1", "import"),
                ("#from key.rc import", "main.rc:1", "import"),
                ("\n#from none.rc import a", "main.rc:2", self.path("none.rc")),
                ("#include loop.rc", "loop.rc:2", "main.rc -> loop.rc -> main.rc")):
            with self.subTest(text):
                error = self.refuse(text, *pieces, files=files)
                self.assertIn(error.filename, ["main.rc"] + list(files))
                self.assertTrue(str(error).startswith("%s:%d: " % (error.filename, error.lineno)))

    def test_missing_files_name_every_path_tried(self):
        error = self.refuse("#if 1\n#include ${n}.rc\n#endif\nn : nosuch", "main.rc:2:",
                            self.path("nosuch.rc"), self.path("cfg", "nosuch.rc"),
                            name="cfg/main.rc")
        self.assertEqual(error.lineno, 2)
        self.refuse("#include ./no.rc", self.path("cfg", "no.rc"), name="cfg/main.rc")
        for name in ("nosuch.rc", "", "a\0b", "\udcff", "x" * 400, self.folder):
            with self.subTest(name[:20]):
                with self.assertRaises(cso.SettingsError) as caught:
                    cso.read_settings(name)
                self.assertIn(os.getcwd(), str(caught.exception))

    def test_files_that_include_each_other_too_deep(self):
        for line in ("#include d%d.rc", "#from d%d.rc import x"):
            files = {"d%d.rc" % k: line % (k + 1) for k in range(150)}
            files["d150.rc"] = "x : 1"
            self.refuse(line % 0, "more than 100 deep", files=files)

    def test_kinds_of_file_names(self):
        path = self.write("main.rc", "a : 1")
        for name in (path, pathlib.Path(path), os.fsencode(path)):
            with self.subTest(repr(name)):
                self.assertEqual(cso.read_settings(name).get("a"), "1")
        for name in (None, 5.5, [path]):
            with self.subTest(repr(name)), self.assertRaises(TypeError):
                cso.read_settings(name)

    def test_files_that_would_never_end(self):
        self.use(mock.patch.object(cso, "MOST_CHARACTERS", 400000))
        doubling = "".join("a%d : ${a%d}${a%d}\n" % (i, i + 1, i + 1) for i in range(64))
        doubling += "a64 : x"
        loops = "".join("#for A%d in 0 1 2 3 4 5 6 7 8 9\n" % i for i in range(9))
        tree = {"f%d.rc" % i: "#from f%d.rc import x\n#from f%d.rc import x as y" % (i + 1, i + 1)
                for i in range(40)}
        tree["f40.rc"] = "x : 1"
        for text, files in (
                (doubling, {}), ("a : " + "${x}" * 99999 + "\nx : " + "y" * 9999, {}),
                (loops + "k.A0A1A2A3A4A5A6A7A8 : 1\n" + "#endfor\n" * 9, {}),
                (loops + "#endfor\n" * 9, {}),
                ("#for A in AA\n" * 40 + "A : 1\n" + "#endfor\n" * 40, {}),
                ("#for A in " + "w" * 9999 + "\nk : " + "A" * 9999 + "\n#endfor", {}),
                ("#if 1\n" * 9999, {}), ("#if 1\n" * 5000 + "#endif\n" * 5000, {}),
                ("#include f.rc\n" * 999, {"f.rc": "! nothing\n" * 999}),
                ("#from f0.rc import x", tree), ("a : " + "$(( 'x' * 9999 ))" * 999, {}),
                ("#include main.rc", {}), ("#from main.rc import a", {}),
                ("#include b.rc", {"b.rc": "#from c.rc import a", "c.rc": "#include main.rc"})):
            with self.subTest(text[:40]):
                self.assertLess(len(str(self.refuse(text, files=files))), 5000)

    def test_large_files(self):
        chain = "".join("k%d : ${k%d}\n" % (i, i + 1) for i in range(5000)) + "k5000 : end"
        self.assertEqual(self.settings(chain).get("k0"), "end")
        for text in (
                "a : " + "x" * 10 ** 6, "a : " + "${x}" * 50000 + "\nx : y",
                "a : " + "$((1))" * 20000, "a : \\\n" + "x \\\n" * 50000,
                "#for x in" + " " * 10 ** 5 + "y\n#endfor\na : 1", "a :" + " " * 10 ** 6 + "x"):
            with self.subTest(text[:20]):
                self.assertIn("a", self.settings(text))
        for text in (
                "a : " + "$((" * 10 ** 5, "a : $((" + "(" * 10 ** 6,
                "#from a" + " " * 10 ** 5 + "b", "x" * 10 ** 6, "#include " + "x/" * 10 ** 5,
                "#if " + "x" * 10 ** 6 + "\n#endif", "#error " + "x" * 10 ** 6,
                "%s : 1\n" % ("k" * 10 ** 5) * 2,
                "a : ${%s}\n%sb : 1" % ("k" * 10 ** 5, "k" * 10 ** 5), bytes(range(1, 256)) * 999,
                "\\!" * 10 ** 5):
            with self.subTest(text[:20]):
                self.assertLess(len(str(self.refuse(text))), 5000)

    def test_command_shows_each_setting_with_its_place(self):
        self.write("sub.rc", "\nb : 2 ! note")
        self.write("main.rc", "a : ${b}/${N}\n#include sub.rc\n#if 0\nc : 1\n#endif\nd : T\n")
        status, out, err = self.run_main("settings", "main.rc", "--env", "N=x", "--set", "d=F")
        self.assertEqual((status, err), (0, ""))
        lines = [re.sub(r"\s+", " ", line) for line in out.splitlines()]
        self.assertEqual(sorted(line.partition(" : ")[0] for line in lines), ["a", "b", "d"])
        for key, value, place in (
                ("a", "2/x", "main.rc:1"), ("b", "2", "sub.rc:2"), ("d", "F", "--set d")):
            with self.subTest(key):
                line, = [line for line in lines if line.startswith("%s : %s " % (key, value))]
                self.assertTrue(line.endswith(place), line)


class OriginalNamesTest(SettingsCase):
    """The names of the original tool keep their signatures and what they do with settings."""

    def utopya(self, text, rcbase="", env={}):
        return cso.UtopyaRc(self.write("main.rc", text), rcbase, env)

    def test_signatures(self):
        """What else there is can be given by keyword only."""
        for function, promised in (
                (cso.CSO_DataSpace_Inquire, "(rcfile, rcbase='', env={}, indent='')"),
                (cso.CSO_DataSpace_Downloader, "()"),
                (cso.CSO_DataSpace_Downloader.CreateToken, "(self, href, indent='')"),
                (cso.CSO_DataSpace_Downloader.DownloadFile,
                 "(self, href, output_file, maxtry=10, nsec_wait=5, "
                 "nsec_wait_max=600, dmode=None, indent='')"),
                (cso.NullAuth, "()"), (cso.UtopyaRc, "(rcfile=None, rcbase='', env={})"),
                (cso.UtopyaRc.InitRc, "(self, rcfile, rcbase='', env={})"),
                (cso.UtopyaRc.GetSetting, "(self, name, totype='', **kwargs)"),
                (cso.UtopyaRc.WriteSettings, "(self, filename)"),
                (cso.RcFile, "(filename, env={})"), (cso.RcFile.keys, "(self)"),
                (cso.RcFile.has_key, "(self, key)"),
                (cso.RcFile.get, "(self, key, totype='', default=None)")):
            with self.subTest(promised):
                signature = inspect.signature(function)
                kept = [parameter for parameter in signature.parameters.values()
                        if parameter.kind is not parameter.KEYWORD_ONLY]
                self.assertEqual(str(signature.replace(parameters=kept)), promised)
        self.assertTrue(issubclass(cso.CSO_DataSpace_Inquire, cso.UtopyaRc))

    def test_rcfile(self):
        env = {"E": 1}
        rcf = cso.RcFile(self.write("main.rc", "n : 3\nx : ${E}\nt : T\nd :\nE : 2"), env=env)
        self.assertEqual((env, sorted(rcf.keys())), ({"E": 1}, ["E", "d", "n", "t", "x"]))
        self.assertEqual((rcf.has_key("n"), rcf.has_key("e")), (True, False))
        self.assertEqual((rcf.get("n"), rcf.get("n", "int"), rcf.get("n", totype="float")),
                         ("3", 3, 3.0))
        self.assertEqual((rcf.get("t", "bool"), rcf.get("d"), rcf.get("x")), (True, "", "1"))
        self.assertEqual((rcf.get("no", "int", "dflt"), rcf.get("n", "int", 7)), ("dflt", 3))
        self.assertEqual(rcf.filename, self.path("main.rc"))
        for key, totype, piece in (("nn", "", "'nn'"), ("t", "", "bool"), ("n", "bool", "bool")):
            with self.subTest(key), self.assertRaisesRegex(Exception, piece):
                rcf.get(key, totype)

    def test_subclass_reads_when_told_to(self):
        class Tool(cso.UtopyaRc):
            def __init__(self):
                cso.UtopyaRc.__init__(self)

        tool = Tool()
        self.assertEqual((tool.rcf, tool.rcfile, tool.rcbase), (None, None, None))
        with self.assertRaises(cso.SettingsError):
            tool.GetSetting("n")
        path = self.write("main.rc", "b.n : ${E}")
        tool.InitRc(path, "b", {"E": "4"})
        self.assertEqual((tool.rcfile, tool.rcbase, tool.GetSetting("n", "int")), (path, "b", 4))
        self.assertTrue(hasattr(tool.logger, "info"))

    def test_fallbacks(self):
        """The full key, then *. before it, then *. before ever less of it; first present wins."""
        keys = ("*.cso.no2.inq.area", "*.no2.inq.area", "*.no2.inq.x", "*.inq.x", "*.inq.url",
                "*.url", "*.start", "cso.no2.inq.timerange.start", "*.cso.no2.inq.timerange.start",
                "plain", "cso.*.mid")
        rc = self.utopya("".join("%s : %s\n" % (key, key) for key in keys) + "*.flag : T",
                         "cso.no2.inq")
        for name, expected in (
                ("timerange.start", "cso.no2.inq.timerange.start"), ("url", "*.inq.url"),
                ("other.url", "*.url"), ("area", "*.cso.no2.inq.area"), ("x", "*.no2.inq.x"),
                ("timerange.x.start", "*.start"), (".url", "*.inq.url")):
            with self.subTest(name):
                self.assertEqual(rc.GetSetting(name), expected)
        for name in ("plain", "mid", "area.x", "nosuch"):
            with self.subTest(name), self.assertRaises(Exception) as caught:
                rc.GetSetting(name)
            for piece in (
                    self.path("main.rc"), "cso.no2.inq." + name, "*.inq." + name, "*." + name):
                self.assertIn(piece, str(caught.exception))
        self.assertIs(rc.GetSetting("flag", "bool"), True)
        self.assertEqual(cso.UtopyaRc(self.path("main.rc")).GetSetting("plain"), "plain")

    def test_defaults(self):
        rc = self.utopya("b.bad : x", "b")
        for default in (5, None, "", "text", False):
            with self.subTest(repr(default)):
                self.assertIs(rc.GetSetting("no", "int", default=default), default)
        with self.assertRaisesRegex(Exception, "main.rc:1"):
            rc.GetSetting("bad", "int", default=5)

    def test_written_settings_read_back_the_same(self):
        values = {
            "plain": "a b", "empty": "", "url": "https://x:1/?a=b#c", "bang": "pa!ss \\! w!",
            "back": "C:\\dir\\", "hash": "#", "var": "${HOME} $${x}", "sum": "$((1+1)) and $((",
            "lines": "one\ntwo : 2\r\n#error no", "quotes": "'\"", "parens": ")) ${x} ((",
            "byte": "a\udcffb", "text": "é 日本 ×", "percent": "%{x} %Y"}
        values.update({"!key": "1", "#key": "2", "${k}": "3", "a b": "4", "": "5",
                       "k\n#error": "6"})
        env = {"%s%d" % (letter, n): text.replace("$((", "$(( '$' ))((")
               for letter, texts in (("k", values), ("v", values.values()))
               for n, text in enumerate(texts)}
        rc = self.utopya("".join("${k%d} : ${v%d}\n" % (n, n) for n in range(len(values))), env=env)
        self.assertEqual({key: rc.rcf.get(key, "str") for key in rc.rcf.keys()}, values)
        self.assertRaises(cso.SettingsError, cso.UtopyaRc().WriteSettings, self.path("out.rc"))
        rc.WriteSettings(self.path("out.rc"))
        again = cso.RcFile(self.path("out.rc"))
        self.assertEqual({key: again.get(key, "str") for key in again.keys()}, values)
        self.assertEqual(self.files(), ["main.rc", "out.rc"], "written beside and renamed")
        with self.assertRaisesRegex(cso.DataSpaceError, "nosuch"):
            rc.WriteSettings(self.path("nosuch", "out.rc"))

    def test_inquire_reports_settings_by_place(self):
        self.write("main.rc", "b.output.file : t.csv\n*.timerange.start : 2020-01-01\n"
                              "b.timerange.end : 2020-01-33")
        with self.assertRaisesRegex(cso.SettingsError, r"main\.rc:3: .*'2020-01-33'"):
            cso.CSO_DataSpace_Inquire("main.rc", "b")


# The truth of footprints, without polygons: a swath is a band along a great circle.

WIDTH = 12.4


def along_and_across(lon, lat, node):
    """What place_of() was given."""
    lon, lat = radians(lon - node), radians(lat)
    x, y, z = cos(lat) * cos(lon), cos(lat) * sin(lon), sin(lat)
    y, z = (y * cos(radians(TILT)) + z * sin(radians(TILT)),
            z * cos(radians(TILT)) - y * sin(radians(TILT)))
    return degrees(atan2(y, x)), degrees(asin(z))


def swath(node, centre, half=103.5):
    """The ring of a swath `half` degrees either way from `centre` degrees after its node."""
    ahead = [centre - half + half * i / 60 for i in range(121)]
    across = [WIDTH * i / 8 for i in range(-8, 9)]
    return ([place_of(u, -WIDTH, node) for u in ahead] +
            [place_of(ahead[-1], v, node) for v in across] +
            [place_of(u, WIDTH, node) for u in reversed(ahead)] +
            [place_of(ahead[0], v, node) for v in reversed(across)])


def inside_swath(place, node, centre, half=103.5):
    """True or False; None within 0.3 degrees of the outline."""
    u, v = along_and_across(place[0], place[1], node)
    depth = min(WIDTH - abs(v), half - abs((u - centre + 180) % 360 - 180))
    return None if abs(depth) < 0.3 else depth > 0


def random_place(chance):
    return [chance.uniform(-180, 180), degrees(asin(chance.uniform(-1, 1)))]


def polygon(*rings):
    return {"type": "Polygon", "coordinates": [[list(place) for place in ring] for ring in rings]}


def rectangle(west, south, east, north):
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def moved(ring, lon=0.0, mirror=1):
    return [[(place[0] + lon + 180) % 360 - 180, mirror * place[1]] for place in ring]


def box_moved(box, lon=0.0, mirror=1):
    west, east = ((x + lon + 180) % 360 - 180 for x in box[::2])
    south, north = sorted(mirror * y for y in box[1::2])
    return [west, south, east, north]


def map_share(geometry):
    """The share of the sphere inside a polygon taken literally on the map."""
    parts = geometry["coordinates"]
    rings = parts if geometry["type"] == "Polygon" else [ring for part in parts for ring in part]
    return -sum((x1 - x0) * (sin(radians(y0)) + sin(radians(y1)))
                for ring in rings for (x0, y0), (x1, y1) in zip(ring, ring[1:])) / 1440


# Recorded footprints, rounded to 0.01 degrees; of the first every fourth place was kept.

NRTI_AT_180 = typed_geometry('MultiPolygon', '''180,81.53 172.18,77.25 168.17,71.65 150.28,70.92
    137.91,70.18 131.78,69.3 124.66,67.67 115.66,64.17 109.07,61.29 98.45,64.98 84.92,67.65
    68.9,68.92 67.25,76.03 66.74,79.77 67.24,82.06 71.39,85.38 121.07,88.81 180,88.11 180,81.53 |
    -180,88.11 -147.53,85.88 -180,81.53 -180,88.11''')
OVER_NORTH_POLE = typed_geometry('Polygon', '''-91.67,68.42 -101.22,74.9 -115.94,80.06
    -147.13,84.09 -180,84.77 -180,90 180,90 180,84.77 154.08,84.23 138.18,85.67 97.21,86.52
    59.95,85.32 42.58,83.05 7.28,84.47 -29.98,83.11 -42.98,81.27 -51.55,78.67 -56.9,75.17
    -61.23,68.06 -91.67,68.42''')
TROPICS = BAND
PAST_180 = typed_geometry('Polygon', '''-181.88,68.44 -182.08,69.34 -179.54,69.39 -179.44,68.49
    -181.88,68.44''')
SCENE = typed_geometry('Polygon', '''-79.01,-3.32 -78.66,-1.69 -80.88,-1.2 -81.23,-2.85
    -79.01,-3.32''')
TRACK = typed_geometry('MultiLineString', '''1.29,-70.06 0,-69.25 | 0,-69.25 -0.97,-68.44
    -10.01,-58.36 -14.56,-49.71 -18.51,-39.19''')

# What is not covered, cut at 180: all but the north, all but a swath that holds both poles.
ALL_BUT_A_CAP = typed_geometry('Polygon', '''-180,60 -90,70 0,50 90,70 180,60 180,-90 -180,-90
    -180,60''')
ALL_BUT_A_SWATH = typed_geometry('MultiPolygon', '''-180,-80 -120,-78 -60,-65 -20,0 -60,65 -120,78
    -180,80 -180,-80 | 180,80 120,78 60,65 20,0 60,-65 120,-78 180,-80 180,80''')


def covered_share(geometry):
    return cso.box_overlap(geometry, [-180, -90, 180, 90])[1]


class FootprintTest(unittest.TestCase):

    def styles(self, ring):
        """The same footprint as catalogues and tools write it."""
        return {
            "as made": polygon(ring),
            "backwards": polygon(ring[::-1]),
            "0 to 360": polygon([[x % 360, y] for x, y in ring]),
            "open": polygon(ring[:-1]),
            "with heights": polygon([[x, y, 0.0] for x, y in ring]),
            "begun elsewhere": polygon(ring[100:-1] + ring[:101]),
            "cut": cso.split_geometry(polygon(ring)),
        }

    def assert_same(self, first, second, message=None):
        self.assertEqual(first[0], second[0], message)
        self.assertAlmostEqual(first[1], second[1], 6, message)

    def test_half_orbits_in_every_style(self):
        chance = random.Random(1)
        for centre, node in [(0, 20), (0, 180), (5, 171), (5, -80), (-20, 100), (20, 0), (35, 175)]:
            ring = swath(node, centre)
            for style, geometry in self.styles(ring).items():
                with self.subTest(centre=centre, node=node, style=style):
                    share = covered_share(geometry)
                    self.assertAlmostEqual(share, 207 / 360 * sin(radians(WIDTH)), 3)
                    for place in [random_place(chance) for _ in range(40)]:
                        inside = inside_swath(place, node, centre)
                        if inside is not None:
                            self.assertEqual(cso.box_overlap(geometry, place + place),
                                             (inside, float(inside)), place)

    def test_orbits_that_overlap_themselves(self):
        chance = random.Random(2)
        for half in (170, 190, 270, 300):
            geometry = polygon(swath(40, 10, half))
            for place in [random_place(chance) for _ in range(60)]:
                inside = inside_swath(place, 40, 10, half)
                if inside is not None:
                    with self.subTest(half=half, place=place):
                        self.assertEqual(cso.box_overlap(geometry, place + place),
                                         (inside, float(inside)))

    def test_boxes(self):
        square = polygon(rectangle(10, 10, 20, 20))
        holed = polygon(rectangle(10, 10, 20, 20), rectangle(12, 12, 18, 18))
        at_180 = polygon(rectangle(170, 10, 180, 20))
        cap = polygon([[0, 70], [90, 70], [180, 70], [-90, 70], [0, 70]])
        south_cap = polygon([[0, -70], [90, -70], [180, -70], [-90, -70], [0, -70]])
        rim = (1 - sin(radians(70))) / (1 - sin(radians(60)))
        tropics = sin(radians(20)) / sin(radians(40))
        bow = polygon([[0, 0], [20, 10], [20, 0], [0, 10], [0, 0]])     # it crosses itself
        south = [[x, -85 - x % 20 / 100] for x in range(-100, 101, 50)]
        north = [[x, -y] for x, y in south]
        for name, geometry, box, overlaps, fraction in [
                ("inside", square, [12, 12, 13, 13], True, 1.0),
                ("around", square, [10, 10, 30, 20], True, 0.5),
                ("apart in longitude", square, [21, 10, 30, 20], False, 0.0),
                ("apart in latitude", square, [10, 21, 20, 30], False, 0.0),
                ("edges meet", square, [20, 10, 30, 20], True, 0.0),
                ("corners meet", square, [20, 20, 30, 30], True, 0.0),
                ("place inside", square, [15, 15, 15, 15], True, 1.0),
                ("place on the corner", square, [20, 20, 20, 20], True, 1.0),
                ("place outside", square, [25, 15, 25, 15], False, 0.0),
                ("line across", square, [5, 15, 25, 15], True, 1.0),
                ("line apart", square, [25, 5, 25, 25], False, 0.0),
                ("across 180 the long way", square, [30, 10, 15, 20], True, 5 / 345),
                ("globe", square, [-180, -90, 180, 90], True,
                 (sin(radians(20)) - sin(radians(10))) / 72),
                ("in the hole", holed, [13, 13, 17, 17], False, 0.0),
                ("touches the hole", holed, [12, 13, 17, 17], True, 0.0),
                ("in the rim", holed, [10.5, 10.5, 11.5, 19], True, 1.0),
                ("ends at 180", at_180, [175, 10, -175, 20], True, 0.5),
                ("begins at 180", at_180, [-180, 10, -175, 20], True, 0.0),
                ("jumps at 180", polygon([[170, 0], [180, 0], [-180, 10], [170, 10], [170, 0]]),
                 [0, 80, 1, 85], False, 0.0),
                ("0 to 360", polygon(rectangle(170, 10, 190, 20)), [-175, 10, -165, 20], True, 0.5),
                ("round the pole", cap, [-180, 60, 180, 90], True, rim),
                ("at the pole", cap, [10, 80, 20, 90], True, 1.0),
                ("the pole", cap, [0, 90, 0, 90], True, 1.0),
                ("the other pole", cap, [0, -90, 0, -90], False, 0.0),
                ("round the south pole", south_cap, [-180, -90, 180, -60], True, rim),
                ("the south pole", south_cap, [7, -90, 7, -90], True, 1.0),
                ("band", TROPICS, [-180, -40, 180, 40], True, tropics),
                ("in the band", TROPICS, [179, -1, -179, 1], True, 1.0),
                ("band 0 to 360", polygon(rectangle(0, -20, 360, 20)), [50, -40, 60, 40], True,
                 tropics),
                ("map of the globe", polygon(rectangle(-180, -90, 180, 90)), [1, 2, 3, 4], True,
                 1.0),
                ("seam of the rest", ALL_BUT_A_SWATH, [170, -10, -170, 10], False, 0.0),
                ("the rest", ALL_BUT_A_SWATH, [-2, -10, 2, 10], True, 1.0),
                ("pole of the rest", ALL_BUT_A_SWATH, [-180, 85, 180, 90], True, 1.0),
                ("pole of all but", ALL_BUT_A_CAP, [0, -90, 10, -80], False, 0.0),
                ("all but", ALL_BUT_A_CAP, [170, 75, -170, 90], True, 1.0),
                ("drawn as 0.55", polygon(south + north[::-1]), [-5, -5, 5, 5], False, 0.0),
                ("west of a bow", bow, [1, 4, 2, 5], True, 1.0),
                ("east of a bow", bow, [18, 4, 19, 5], True, 1.0),
                ("between its wings", bow, [9, 8, 11, 9], False, 0.0),
                ("recorded", NRTI_AT_180, [90, 75, 110, 80], True, 1.0),
                ("recorded, across 180", NRTI_AT_180, [178, 85, -178, 86], True, 1.0),
                ("recorded, apart", NRTI_AT_180, [-150, 60, -100, 85], False, 0.0),
                ("recorded, pole", OVER_NORTH_POLE, [-100, 89, 100, 90], True, 1.0),
                ("recorded, beside", OVER_NORTH_POLE, [0, 50, 100, 80], False, 0.0),
                ("recorded, past 180", PAST_180, [178.2, 68.6, 179, 69], True, 1.0),
                ("recorded, corners", SCENE, [-80, -3, -79, -2], True, 1.0)]:
            with self.subTest(name):
                found = cso.box_overlap(geometry, box)
                self.assertEqual(found[0], overlaps)
                self.assertAlmostEqual(found[1], fraction, 6)

    def test_edges_meet_whatever_the_digits(self):
        for lon in [i / 10 for i in range(-1800, 1800)]:
            square = polygon(rectangle(round((lon + 150) % 360 - 180, 1), 0, lon, 10))
            for east in (lon, round(lon + 360, 1)):
                if not cso.box_overlap(square, [east, 2, east + 1, 3])[0]:
                    self.fail("%r does not meet %r" % (lon, east))
            cap = polygon(moved([[0, 70], [90, 71], [180, 70], [-90, 71]], lon))
            if cso.box_overlap(cap, [lon, 80, lon, 80]) != (True, 1.0):
                self.fail("ring that begins at %r" % lon)

    def test_long_edges_are_great_circles_and_parallels_are_not(self):
        high, middle = [29, 62.5, 31, 63], [1.7, 29.9, 2.2, 30.1]
        for name, ring, box, overlaps in [
                ("rises to 63.7", [[0, 60], [60, 60.5], [60, 50.5], [0, 50]], high, True),
                ("parallel", rectangle(0, 50, 60, 60), high, False),
                ("rises by 0.04", [[0, 60], [5, 60.1], [5, 55.1], [0, 55.1]],
                 [2.45, 60.065, 2.55, 60.066], True),
                ("1.6 east at 30", [[0, 0], [4.9, 60], [10, 60.1], [5, 0.1]], middle, True)]:
            with self.subTest(name):
                self.assertEqual(cso.box_overlap(polygon(ring), box)[0], overlaps)
                self.assertEqual(cso.box_overlap(polygon(moved(ring, 0, -1)),
                                                 box_moved(box, 0, -1))[0], overlaps)

    def test_lines_meet_a_box_or_not(self):
        line = {"type": "LineString", "coordinates": [[170, 0], [178, 10], [-174, 20]]}
        for geometry, box, overlaps in [
                (line, [-177, 10, -175, 30], True), (line, [-177, 0, -170, 10], False),
                (line, [177, 9, 179, 11], True), (line, [178, 10, 178, 10], True),
                (TRACK, [-20, -60, -5, -40], True), (TRACK, [-20, -80, -5, -70], False),
                (TRACK, [0, -69.25, 20, -60], True), (TRACK, [5, -69, 20, 60], False)]:
            with self.subTest(box=box):
                self.assertEqual(cso.box_overlap(geometry, box), (overlaps, 0.0))
        self.assertEqual(covered_share(TRACK), 0.0)

    def test_what_cannot_be_understood_is_unknown(self):
        ring = rectangle(10, 10, 20, 20)
        for geometry in [
                None, {}, [], "POLYGON", 7, {"type": "Polygon"}, {"type": ["Polygon"]},
                {"type": "Polygon", "coordinates": None},
                {"type": "Polygon", "coordinates": []},
                {"type": "Polygon", "coordinates": [[]]},
                {"type": "Polygon", "coordinates": 5},
                {"type": "Polygon", "coordinates": ring},
                {"type": "MultiPolygon", "coordinates": []},
                {"type": "MultiPolygon", "coordinates": [[]]},
                {"type": "Surface", "coordinates": [ring]},
                {"type": "Point", "coordinates": [10, 10]},
                {"type": "GeometryCollection", "geometries": [polygon(ring)]},
                {"type": "LineString", "coordinates": [[1, 2]]},
                polygon([[10, 10]]), polygon([[10, 10]] * 4), polygon([[10], [20], [30]]),
                polygon(ring[:2] + [["15", "20"]] + ring[2:]),
                polygon([[str(x), y] for x, y in ring]),
                polygon(ring[:2] + [[float("nan"), 20]] + ring[2:]),
                polygon(ring[:2] + [[20, float("inf")]] + ring[2:]),
                polygon(ring[:2] + [[10 ** 400, 20]] + ring[2:]),
                polygon(ring[:2] + [[None, 20]] + ring[2:]), polygon(ring, [[10, 91], [0, 1]])]:
            with self.subTest(geometry=geometry):
                self.assertEqual(cso.box_overlap(geometry, [50, 50, 60, 60]), (True, None))
                self.assertIsNone(covered_share(geometry))
                self.assertIsNone(cso.split_geometry(geometry))

    # Properties, of cases at random: rings of swaths, granules and frames, boxes of any size.

    def frame(self, start, length):
        return [place_of(u, v, 77) for u, v in rectangle(start, 1, start + length, 5)]

    def random_cases(self, seed, number):
        chance = random.Random(seed)
        for _ in range(number):
            ring = chance.choice([
                lambda: swath(chance.uniform(-180, 180), chance.uniform(-40, 40)),
                lambda: swath(chance.uniform(-180, 180), chance.uniform(-180, 180), 10),
                lambda: self.frame(chance.uniform(-180, 180), chance.uniform(1, 80)),
            ])()
            west, south = chance.uniform(-180, 180), chance.uniform(-90, 80)
            width = chance.choice([1, 20, 120, 359])
            north = south + chance.uniform(0, 1) * (90 - south)
            yield chance, ring, [west, south, (west + width + 180) % 360 - 180, north]

    def test_nothing_changes_with_place_mirror_or_direction(self):
        for chance, ring, box in self.random_cases(3, 60):
            with self.subTest(ring=ring[:3], box=box):
                found = cso.box_overlap(polygon(ring), box)
                shift = chance.uniform(-180, 180)
                self.assert_same(found, cso.box_overlap(polygon(ring[::-1]), box), "backwards")
                self.assert_same(found, cso.box_overlap(polygon(moved(ring, shift)),
                                                        box_moved(box, shift)), "moved")
                self.assert_same(found, cso.box_overlap(polygon(moved(ring, 0, -1)),
                                                        box_moved(box, 0, -1)), "mirrored")

    def test_parts_of_a_box_add_up(self):
        for chance, ring, (west, south, east, north) in self.random_cases(4, 60):
            east += 360 if east < west else 0
            x, y = chance.uniform(west, east), chance.uniform(south, north)
            whole = cso.box_overlap(polygon(ring), [west, south, east, north])
            boxes = [[west, south, x, y], [x, south, east, y],
                     [west, y, x, north], [x, y, east, north]]
            parts = [cso.box_overlap(polygon(ring), box) for box in boxes]
            sizes = [(e - w) * (sin(radians(n)) - sin(radians(s))) for w, s, e, n in boxes]
            with self.subTest(box=[west, south, east, north]):
                self.assertEqual(whole[0], any(overlaps for overlaps, _ in parts))
                self.assertAlmostEqual(whole[1] * sum(sizes), sum(
                    fraction * size for (_, fraction), size in zip(parts, sizes)), 6)

    def test_quick_answer_is_the_answer(self):
        quick = 0
        for _, ring, box in self.random_cases(5, 120):
            found = cso.box_overlap(polygon(ring), box)
            with mock.patch.object(cso, "far_apart", lambda *_: False):
                self.assert_same(found, cso.box_overlap(polygon(ring), box), (ring[:3], box))
            parts = cso.read_parts(polygon(ring))
            quick += cso.far_apart(parts, box[0], box[1], box[2] + 360 * (box[2] < box[0]), box[3])
        self.assertGreater(quick, 10)

    # GeoJSON that other programs read.

    def assert_rfc_7946(self, geometry):
        parts = geometry["coordinates"]
        for part in [parts] if geometry["type"] == "Polygon" else parts:
            for i, ring in enumerate(part):
                self.assertEqual(ring[0], ring[-1])
                self.assertEqual({len(place) for place in ring}, {2})
                self.assertTrue(all(here != there for here, there in zip(ring, ring[1:])))
                self.assertEqual(map_share(polygon(ring)) > 0, i == 0, "counterclockwise")
                for (x0, y0), (x1, y1) in zip(ring, ring[1:]):
                    self.assertTrue(-180 <= x0 <= 180 and -90 <= y0 <= 90)
                    self.assertTrue(abs(x1 - x0) <= 180 or y0 == y1, "no edge crosses 180")

    def test_split_covers_what_is_covered(self):
        cases = [polygon(ring) for _, ring, _ in self.random_cases(6, 40)]
        cases += [polygon(swath(171, 0)), polygon(swath(180, 0)), polygon(swath(180, 0)[::-1]),
                  NRTI_AT_180, OVER_NORTH_POLE, TROPICS, PAST_180, SCENE, ALL_BUT_A_SWATH,
                  ALL_BUT_A_CAP, polygon(rectangle(0, -20, 360, 20)),
                  polygon(rectangle(-180, -90, 180, 90)),
                  polygon(rectangle(170, 10, 190, 20), rectangle(178, 12, 182, 18)),
                  polygon(rectangle(170, 10, 190, 20), rectangle(172, 12, 174, 18))]
        chance = random.Random(7)
        for geometry in cases:
            with self.subTest(geometry=str(geometry)[:120]):
                split = cso.split_geometry(geometry)
                self.assert_rfc_7946(split)
                self.assertAlmostEqual(map_share(split), covered_share(geometry), 7)
                for place in [random_place(chance) for _ in range(5)]:
                    self.assertEqual(cso.box_overlap(split, place + place),
                                     cso.box_overlap(geometry, place + place))

    def test_split_writes_these(self):
        for geometry, expected in [
                (polygon(rectangle(170, 10, 190, 20)),
                 [[rectangle(170, 10, 180, 20)], [rectangle(-180, 10, -170, 20)]]),
                (polygon(self.begun_within(rectangle(170, 10, 190, 20)),
                         self.begun_within(rectangle(178, 12, 182, 18))),
                 [[rectangle(170, 10, 180, 20) + rectangle(178, 12, 180, 18) +
                   [[170, 15], [178, 15]]],
                  [rectangle(-180, 10, -170, 20) + rectangle(-180, 12, -178, 18)]]),
                (polygon(rectangle(10, 20, 20, 10)), [rectangle(10, 10, 20, 20)]),
                (polygon(rectangle(10, 10, 20, 20), rectangle(12, 12, 18, 18)),
                 [rectangle(10, 10, 20, 20), rectangle(12, 12, 18, 18)[::-1]]),
                ({"type": "LineString", "coordinates": [[170, 0], [-170, 0], [-160, 0]]},
                 [[[170, 0], [180, 0]], [[-180, 0], [-170, 0], [-160, 0]]])]:
            with self.subTest(geometry=geometry):
                split = cso.split_geometry(geometry)
                self.assertEqual(self.sorted_places(split["coordinates"]),
                                 self.sorted_places(expected))
                self.assertTrue(split["type"].endswith(geometry["type"]))
                self.assertEqual(json.loads(json.dumps(split)), split)

    def begun_within(self, ring):
        """The ring of a rectangle, begun in the middle of its west side."""
        middle = [ring[0][0], (ring[0][1] + ring[3][1]) / 2]
        return [middle] + ring[:4] + [middle]

    def sorted_places(self, nested):
        """Lists of lines as sorted sets of places: where a ring begins does not matter."""
        if not isinstance(nested[0][0], list):
            return sorted({tuple(place) for place in nested})
        return sorted(map(self.sorted_places, nested))

    # The text of OData.

    def test_geometry_from_wkt(self):
        ring = [[10, 10.5], [20, -1e-3], [15.25, 20], [10, 10.5]]
        text = "(10 10.5, 20 -1e-3,15.25 20 , 10 10.5)"
        for written, kind, coordinates in [
                ("geography'SRID=4326;POLYGON (%s)'" % text, "Polygon", [ring]),
                ("POLYGON(%s)" % text, "Polygon", [ring]),
                ("polygon (%s,\n%s)" % (text, text), "Polygon", [ring, ring]),
                ("SRID=4326;POLYGON Z ((1 2 3, 4 5 6))", "Polygon", [[[1, 2], [4, 5]]]),
                ("geography'SRID=4326;MULTIPOLYGON ((%s), (%s, %s))'" % (text, text, text),
                 "MultiPolygon", [[ring], [ring, ring]]),
                ("LINESTRING %s" % text, "LineString", ring),
                ("MULTILINESTRING (%s, (1 2, 3 4))" % text, "MultiLineString",
                 [ring, [[1, 2], [3, 4]]])]:
            with self.subTest(written=written):
                self.assertEqual(cso.geometry_from_wkt(written),
                                 {"type": kind, "coordinates": coordinates})
        for text in [None, 7, "", "POLYGON", "POLYGON EMPTY", "geography'SRID=4326;POLYGON (())'",
                     "POLYGON (1 2, 3 4)", "POLYGON (((1 2, 3 4)))", "POLYGON ((1 2, 3 4)",
                     "POLYGON ((1 2, 3 x))", "POLYGON ((1, 2))", "CIRCLE ((1 2, 3 4))", "((1 2))",
                     "POLYGON ((1 2, 3 4)) and more", "MULTIPOLYGON ((1 2, 3 4))"]:
            with self.subTest(text=text):
                self.assertIsNone(cso.geometry_from_wkt(text))


# ---------------------------------------------------------------------------------------
# Names, catalogues, tables
# ---------------------------------------------------------------------------------------

NO2 = 'S5P_OFFL_L2__NO2____20250311T115807_20250311T133937_38393_03_020800_20250313T042301.nc'
ZIPPER = 'https://zipper.dataspace.copernicus.eu/odata/v1/Products(%s)/$value'
DOWNLOAD = 'https://download.dataspace.copernicus.eu/odata/v1/Products(%s)/$value'
UUID = 'b3f240e6-505d-4cae-97ea-43a8778a318d'
CATALOGUE = 'catalogue.dataspace.copernicus.eu'
HEADER = 'orbit;start_time;end_time;processing;collection;processor_version;filename;href\n'
APIS = 'odata', 'opensearch', 'stac'
EUROPE = typed_geometry('Polygon', '-40,20 40,20 40,80 -40,80 -40,20')


def s5p(name, start=None, end=None, id=None, geometry=EUROPE):
    """The record of a Sentinel-5P name; measured from start to end, else as the name says."""
    def time(compact):
        return '%s-%s-%sT%s:%s:%sZ' % (compact[:4], compact[4:6], compact[6:8], compact[9:11],
                                       compact[11:13], compact[13:15])
    id = id or re.sub('(.{8})(.{4})(.{4})(.{4})(.{12})', r'\1-\2-\3-\4-\5',
                      MD5(name.encode()).hexdigest())
    return Record(id, name, 'SENTINEL-5P', name[9:19], as_time(start or time(name[20:35])),
                  as_time(end or time(name[36:51])), as_time('2022-12-01'), 1000,
                  int(name[52:57]), geometry=geometry)


CH4 = s5p('S5P_RPRO_L2__CH4____20200101T023416_20200101T041546_11488_03_020400_20221120T003820.nc',
          '2020-01-01T03:41:12Z', '2020-01-01T03:54:30Z', UUID)
CH4_ROW = ('11488;2020-01-01 02:34:16;2020-01-01 04:15:46;RPRO;03;020400;%s;%s\n'
           % (CH4.name, ZIPPER % UUID))


def copies(count):
    """Records of so many products that start at the same time."""
    one = made_products(1, checksum='')[0]
    return [one._replace(id='%08x%s' % (number, one.id[8:])) for number in range(count)]


def odata_entry(**changes):
    """A product as OData writes it, with changes; a field changed to KeyError is left out."""
    return changed(changes, Id=UUID, Name=NO2, ContentLength=622854144, Checksum=[],
                   PublicationDate='2025-03-13T05:00:00.000000Z', GeoFootprint=None,
                   ContentDate={'Start': '2025-03-11T12:19:40Z', 'End': '2025-03-11T13:18:05Z'})


def resto_entry(**changes):
    """A product as OpenSearch writes it, with changes of its properties, or of `geometry`."""
    geometry = changes.pop('geometry', None)
    return {'type': 'Feature', 'id': UUID, 'geometry': geometry, 'properties': changed(
        changes, title=NO2, productType='L2__NO2___', orbitNumber=38393, timeliness=None,
        startDate='2025-03-11T12:19:40Z', completionDate='2025-03-11T13:18:05Z',
        published='2025-03-13T05:00:00Z', services={'download': {
            'url': 'https://%s/download/%s' % (CATALOGUE, UUID),
            'mimeType': 'application/octet-stream', 'size': 622854144}})}


def stac_entry(id=NO2[:-3], key='netcdf', asset={}, **changes):
    """A product as STAC writes it, with changes of its properties and of its asset."""
    return {'type': 'Feature', 'id': id, 'geometry': None, 'properties': changed(
        changes, datetime='2025-03-11T12:19:40Z', start_datetime='2025-03-11T12:19:40Z',
        end_datetime='2025-03-11T13:18:05Z', published='2025-03-13T05:00:00Z',
        **{'sat:absolute_orbit': 38393, 'product:type': 'L2__NO2___'}), 'assets': {
            'thumbnail': {'href': 's3://eodata/thumbnail.png'}, key: changed(asset, **{
                'href': 's3://eodata/Sentinel-5P/TROPOMI/L2__NO2___/2025/03/11/' + NO2,
                'file:local_path': NO2, 'file:size': 622854144,
                'file:checksum': 'd50110' + 32 * 'a', 'alternate': {'https': {
                    'href': (ZIPPER % UUID).replace('$', 'Nodes(%s)/$' % NO2)}}})}}


def changed(changes, **entry):
    entry.update(changes)
    return {name: value for name, value in entry.items() if value is not KeyError}


def page_of(api, *entries):
    """A page of a service."""
    return {'value': list(entries)} if api == 'odata' else {
        'type': 'FeatureCollection', 'features': list(entries)}


class CatalogueCase(Case):
    """Inquiries of the stand-in."""

    def rc(self, space=None, settings={}, api='odata'):
        """Write my.rc, an inquiry of all NO2 of 2015 to 2024 with other settings; its path."""
        values = {'timerange.start': '2015-01-01', 'timerange.end': '2025-01-01',
                  'collection': 'Sentinel5P', 'producttype': 'L2__NO2___',
                  'output.file': self.path('table.csv'), 'url': getattr(space, api, '')}
        values.update(settings)
        return self.write('my.rc', ''.join('my.%s : %s\n' % (name, value)
                                           for name, value in values.items() if value is not None))

    def inquire(self, space, settings={}, api='odata', **session):
        """Return the rows of an inquiry, which writes table.csv."""
        settings = cso.read_settings(self.rc(space, settings, api))
        return cso.inquire(settings, 'my', self.session(space, **session))

    def names(self, space, settings={}, api='odata'):
        return [row.filename for row in self.inquire(space, settings, api)]

    def table(self, space, settings={}, api='odata', **session):
        """Return the bytes of the table of an inquiry."""
        self.inquire(space, settings, api, **session)
        return self.read('table.csv')

    def tables(self, space, settings={}):
        """Return the one table that all three services give."""
        found = [self.table(space, settings, api) for api in APIS]
        self.assertEqual(found[0], found[1], 'OpenSearch')
        self.assertEqual(found[0], found[2], 'STAC')
        return found[0].decode()

    def small_pages(self, size=10):
        self.use(mock.patch.dict(cso.PAGE, dict.fromkeys(cso.PAGE, size)))

    @contextlib.contextmanager
    def logged(self, level='INFO'):
        """The messages of the log within a with block; those of lower levels are left out."""
        messages = []
        with self.assertLogs('cso_dataspace', 'DEBUG') as logged:
            cso.log.debug('for assertLogs, which wants one at least')
            yield messages
        messages += [record.getMessage() for record in logged.records
                     if record.levelno >= getattr(logging, level)]

    def tell(self, space, api, body, status=200):
        """From now on let a service give this answer."""
        space.faults.clear()
        space.faults.add('told', api, None, body=body, status=status)

    def search(self, space, api):
        query = cso.Query(getattr(space, api), 'Sentinel5P', 'L2__NO2___',
                          datetime.datetime(2025, 3, 11), datetime.datetime(2025, 3, 12))
        return list(cso.search(query, self.session(space)))


class NamesTest(Case):
    """File names, times, boxes and urls, as they are written and as they are meant."""

    def test_columns_of_names(self):
        for name, expected in (
                (NO2, 'OFFL L2__NO2___ 38393 03 020800 20250311T115807 20250311T133937'),
                (NO2[:-3], 'OFFL L2__NO2___ 38393 03 020800 20250311T115807 20250311T133937'),
                (CH4.name, 'RPRO L2__CH4___ 11488 03 020400 20200101T023416 20200101T041546'),
                ('S5P_RPRO_L1B_RA_BD1_20180430T001950_20180430T020120_02818_01_010000_'
                 '20220630T164539.nc', 'RPRO L1B_RA_BD1 02818 01 010000 20180430T001950 '
                                       '20180430T020120'),
                ('S5P_PAL__L2B_SIF____20180430T001950_20180430T020120_02818_01_010000_'
                 '20220630T164539.nc', 'PAL_ L2B_SIF___ 02818 01 010000 20180430T001950 '
                                       '20180430T020120'),
                ('S5P_NRTI_L2__O3_TCL_20240917T000000_20240918T000000_00000_03_000000_'
                 '20240919T000001.nc', 'NRTI L2__O3_TCL 00000 03 000000 20240917T000000 '
                                       '20240918T000000'),
                ('S5P_OPER_AUX_CTMANA_20231024T000000_20231025T000000_20231101T133927.nc',
                 'OPER AUX_CTMANA - - - 20231024T000000 20231025T000000'),
                ('S2A_MSIL1C_20150904T105046_N0500_R051_T31VED_20231009T083312.SAFE',
                 '- - - 0500 - - -'),
                ('S3A_OL_1_EFR____20160501T023419_20160501T023719_20180207T115325_0179_003_317_2700'
                 '_LR2_R_NT_002.SEN3', '- - - 002 - - -'),
                ('S6A_P4_2__LR______20240225T015518_20240225T025131_20240226T073654_3373_121_117_'
                 '058_EUM__OPE_ST_F08.SEN6', '- - - F08 - - -'),
                ('S1A_IW_GRDH_1SSV_20151025T011820_20151025T011832_008302_00BB48_21CF.SAFE',
                 '- - - - - - -'),
                ('', '- - - - - - -'), ('x' + NO2, '- - - - - - -')):
            with self.subTest(name):
                told = cso.parse_name(name)
                self.assertEqual(' '.join(told.get(column) or '-' for column in (
                    'processing producttype orbit collection processor_version start end'
                    ).split()), expected)

    def test_times_are_cut_to_milliseconds(self):
        time_ = datetime.datetime(2018, 7, 1, 0, 0, 0, 999999)
        self.assertEqual(cso.format_time(time_), '2018-07-01T00:00:00.999Z')

    def test_boxes(self):
        for text, expected in (
                ('-30,30,35,76', (-30, 30, 35, 76)), ('-180,-90,180,90', (-180, -90, 180, 90)),
                (' -30.5 , 30 ,35, 7.6e1', (-30.5, 30, 35, 76)), ('0,0,360,1', (0, 0, 360, 1)),
                ('5,10,5,10', (5, 10, 5, 10)),
                ('170,-10,-170,10', (170, -10, -170, 10)), ('', None), ('  ', None)):
            with self.subTest(text):
                self.assertEqual(cso.Box.from_text(text), expected)
        for text in ('-30,76,35,30', '30,-30,76,135', '1,2,3', '1,2,3,4,5', 'a,b,c,d',
                     '-30 30 35 76', '0,0,1,nan', 'nan,0,1,1', '0,0,inf,1', '-361,0,0,1',
                     '-200,0,200,1', ',,,'):
            with self.subTest(text), self.assertRaises(ValueError):
                cso.Box.from_text(text)


class CatalogueTest(CatalogueCase):
    """Three services, one Product: the same query gives the same table."""

    def test_whole_recorded_set(self):
        kinds = collections.defaultdict(list)
        for record in RECORDS:
            kinds[record.collection, record.producttype].append(record.name)
        self.assertGreater(len(kinds), 30)
        with DataSpace() as space:
            for (collection, producttype), names in sorted(kinds.items()):
                settings, tables = {'collection': collection, 'producttype': producttype}, set()
                for api in APIS:
                    with self.subTest(producttype, api=api):
                        if api == 'opensearch':         # each mission has two spellings
                            settings['collection'] = collection.replace('SENTINEL-', 'Sentinel')
                        if api == 'stac' and producttype.startswith(('L1B_IR_', 'AUX_')):
                            with self.assertRaisesRegex(cso.CatalogueError, 'no collection for .*'
                                                        + producttype):
                                self.inquire(space, settings, api)
                        else:
                            found = self.names(space, settings, api)
                            self.assertEqual(sorted(found), sorted(names))
                            tables.add(self.read('table.csv'))
                            self.assertEqual(len(tables), 1)

    def test_areas_periods_and_small_pages(self):
        self.small_pages(7)
        with DataSpace(list(made_products(30, points=21, checksum=''))) as space:
            whole = {'timerange.start': '2018-07-01', 'timerange.end': '2018-07-04'}
            counts = set()
            for area, method in (('', 'POST'), ('-30,30,35,76', 'GET'), ('-30,30,35,76', 'POST'),
                                 ('170,-50,-170,50', 'GET'), ('-180,-90,180,90', 'GET'),
                                 ('0,-89,40,-80', 'GET'), ('100,-10,101,-9', 'GET')):
                with self.subTest(area, method=method):
                    alone = self.table(space, dict(whole, area=area))
                    counts.add(alone.count(b'\n') - 1)
                    space.stac_next = method
                    self.assertEqual(self.tables(space, dict(
                        whole, area=area, **{'area.filter': 'server'})).encode(), alone)
            self.assertTrue(counts > {30} and 0 not in counts, counts)
            day = self.tables(space, {'timerange.start': '2018-07-02 03:00',
                                      'timerange.end': '2018-07-02 09:00'})
            self.assertEqual(day.count('\n'), 1 + 4, day)

    def read_entries(self, api, cases):
        """Let a service give single entries; compare fields of the products, as text."""
        space = self.use(DataSpace([]))
        for entry, fields, expected in cases:
            with self.subTest(fields=fields, entry=entry):
                self.tell(space, api, page_of(api, entry))
                product, = self.search(space, api)
                self.assertEqual(product.product_id, UUID)
                self.assertEqual(' '.join(str(getattr(product, field)) for field in fields.split()),
                                 str(expected))

    def test_entries_of_odata(self):
        self.read_entries('odata', [
            (odata_entry(ContentDate={'Start': '2025-03-11T12:19:40' + written, 'End': (
                '2025-03-11T13:18:05' + written)}), 'start end',
             '2025-03-11 12:19:40%s 2025-03-11 13:18:05%s' % (meant, meant))
            for written, meant in (('Z', ''), ('.1Z', '.100000'), ('.123Z', '.123000'), ('', ''), ('z', ''),
                                   ('.123456Z', '.123456'), ('.123456789Z', '.123456'),
                                   ('.999999999Z', '.999999'), ('.123456+00:00', '.123456'),
                                   ('.000000Z', ''))])
        self.read_entries('odata', [
            (odata_entry(ContentDate={'Start': start, 'End': '2025-03-11T23:00:00Z'}), 'start', (
                meant)) for start, meant in (('2025-03-11T01:01:00+02:00', '2025-03-10 23:01:00'),
                                             ('2025-03-10T23:01:00-0330', '2025-03-11 02:31:00'))])
        self.read_entries('odata', [
            (odata_entry(ContentLength=size), 'size', known) for size, known in (
                (622854144, 622854144), (1, 1), (0, 0), (-1, 0), (None, 0), (KeyError, 0))])
        with DataSpace([]) as space, self.assertRaisesRegex(cso.CatalogueError, 'not a time'):
            self.tell(space, 'odata', page_of('odata', odata_entry(ContentDate={
                'Start': '2025-03-11T12:19:40.123+01Z', 'End': '2025-03-11T23:00:00Z'})))
            self.search(space, 'odata')
        zeros, md5 = 32 * '0', 'FB6A3D0D83655781C952C6FB6E88F962'
        blake3 = {'Value': 2 * md5, 'Algorithm': 'BLAKE3'}
        self.read_entries('odata', [(odata_entry(Checksum=[changed(
            {}, Value=value, Algorithm='MD5')]), 'md5', '') for value in (
                '', 'N/A', zeros, None, md5[1:], md5 + '0', '0x' + md5[2:], KeyError)] + [
            (odata_entry(Checksum=checksum), 'md5', known) for checksum, known in (
                (KeyError, ''), (None, ''), ([], ''), ([{}], ''), ([blake3], ''),
                ([blake3, {'Value': md5, 'Algorithm': 'MD5'}], md5.lower()))])
        some = [{'Name': 'orbitNumber', 'Value': 9756}, {'Name': 'timeliness', 'Value': 'NT'},
                {'Name': 'productType', 'Value': 'SR_2_WAT___'}, {'Name': 'cloudCover'}]
        self.read_entries('odata', [
            (odata_entry(Attributes=some), 'orbit processing producttype', '9756 NT SR_2_WAT___'),
            (odata_entry(Attributes=some[1:2]), 'orbit processing producttype', ' NT ')] + [
            (odata_entry(Attributes=none), 'orbit processing producttype', '  ')
            for none in (KeyError, None, [])] + [
            (odata_entry(GeoFootprint=EUROPE), 'geometry', EUROPE),
            (odata_entry(GeoFootprint=KeyError), 'geometry', None),
            (odata_entry(), 'geometry', None),
            (odata_entry(PublicationDate=KeyError), 'published', '')])

    def test_entries_of_opensearch(self):
        self.read_entries('opensearch', [
            (resto_entry(), 'filename orbit size', NO2 + ' 38393 622854144'),
            (resto_entry(geometry=[]), 'geometry', None), (resto_entry(), 'geometry', None),
            (resto_entry(geometry=EUROPE), 'geometry', EUROPE),
            (resto_entry(startDate='2025-03-11T12:19:40.494+00:00'), 'start',
             '2025-03-11 12:19:40.494000'),
            (resto_entry(timeliness='Fast-24h'), 'processing', 'Fast-24h'),
            (resto_entry(timeliness=KeyError), 'processing', ''),
            (resto_entry(productType=KeyError), 'producttype', ''),
            (resto_entry(services=KeyError), 'size', 0),
            (resto_entry(services={'download': None}), 'size', 0)] + [
            (resto_entry(orbitNumber=orbit), 'orbit', '') for orbit in (0, None, KeyError)] + [
            (resto_entry(services={'download': {'mimetype': None, 'size': size}}), 'size', known)
            for size, known in ((1000, 1000), (0, 0), (-1, 0))])

    def test_entries_of_stac(self):
        name6 = ('S6A_P4_2__LR______20240225T015518_20240225T025131_20240226T073654_3373_121_117_'
                 '058_EUM__OPE_ST_F08.SEN6')
        tcl = 'S5P_RPRO_L2__O3_TCL_20190205T111300_20190211T115915_06854_03_020401_20230329T133105'
        zipped = {'href': DOWNLOAD % UUID, 'alternate': KeyError, 'file:local_path': name6 + '.zip'}
        former = {'href': DOWNLOAD % UUID, 'alternate': {'s3': {'href': '/eodata/' + name6}},
                  'file:local_path': KeyError}
        category = {'product:timeliness_category': 'NRTI'}
        self.read_entries('stac', [
            (stac_entry(), 'filename size md5', '%s 622854144 %s' % (NO2, 32 * 'a')),
            (stac_entry(asset={'file:local_path': KeyError}), 'filename', NO2),
            (stac_entry(start_datetime=KeyError), 'start', '2025-03-11 12:19:40'),
            (stac_entry(**{'sat:absolute_orbit': KeyError}), 'orbit', ''),
            (stac_entry(**category), 'processing', 'NRTI'), (stac_entry(), 'processing', ''),
            (stac_entry(asset={'file:size': KeyError}), 'size', 0),
            # reprocessed ozone goes by an id that is not its name
            (stac_entry(tcl.replace('RPRO', 'OFFL').replace('_03_', '_01_'), asset={
                'file:local_path': tcl + '.nc'}), 'filename', tcl + '.nc'),
            (stac_entry(name6, 'PRODUCT', former), 'filename', name6)] + [
            (stac_entry(name6, key, zipped), 'filename', name6)
            for key in ('product', 'Product', 'PRODUCT')] + [
            (stac_entry(asset={'file:checksum': checksum}), 'md5', '')
            for checksum in ('1220' + 64 * 'a', 'd40110' + 32 * 'a', 'd50110' + 32 * '0', '', None,
                             KeyError)])

    def test_footprints_in_both_forms_of_odata(self):
        space = self.use(DataSpace([]))
        text = "geography'SRID=4326;POLYGON ((-40 20, 40 20, 40 80, -40 80, -40 20))'"
        for entry in (odata_entry(GeoFootprint=EUROPE), odata_entry(Footprint=text),
                      odata_entry(GeoFootprint=KeyError, Footprint=text)):
            for area, count in (('0,30,10,50', 1), ('100,-60,120,-40', 0)):
                with self.subTest(area, entry=entry):
                    self.tell(space, 'odata', page_of('odata', entry))
                    self.assertEqual(len(self.inquire(space, {
                        'area': area, 'timerange.end': '2026-01-01'})), count)

    def test_entries_that_say_too_little_are_errors(self):
        self.write('table.csv', 'old')
        space = self.use(DataSpace([]))
        for api, entry in (('odata', {}), ('odata', odata_entry(Id=KeyError)), ('odata', None),
                           ('odata', odata_entry(ContentDate=None)),
                           *(('odata', odata_entry(ContentDate={'Start': text, 'End': text}))
                             for text in ('now', '', '2024-06-04', '2024-06-04T24:01:00Z',
                                          '2024-06-04T11:01:00.1234567890Z',
                                          '2024-06-04T11:01:00.123+01Z',
                                          '2024-06-04T11:01:00 CEST')),
                           ('opensearch', {'properties': {}}), ('opensearch', {}),
                           ('opensearch', resto_entry(title=KeyError)),
                           ('stac', stac_entry(asset={'alternate': KeyError})),
                           *((api, entry) for text in ('a\rb', 'a\nb', 'a\ud800') for api, entry in (
                               ('odata', odata_entry(PublicationDate=text)),
                               ('opensearch', dict(resto_entry(), id=text)),
                               ('stac', stac_entry(**{'product:timeliness_category': text})))),
                           ('opensearch', dict(resto_entry(), id='x)/../../y(')),
                           ('stac', {'id': 'x', 'properties': {}})):
            with self.subTest(api, entry=entry):
                self.tell(space, api, page_of(api, entry))
                with self.assertRaisesRegex(cso.CatalogueError, re.escape(getattr(space, api))):
                    self.inquire(space, {}, api)
                self.assertEqual(self.read('table.csv'), b'old')

    def test_names_that_are_no_file_names_are_errors(self):
        space = self.use(DataSpace([]))
        for name in ('', '.', '..', '...', ' .. ', '../a.nc', '/etc/passwd', 'a/b.nc', 'a\\b.nc',
                     'C:a.nc', 'a\nb.nc', 'a\0b.nc', 'a\x7fb', 'NUL', 'con.nc', 'a.nc:stream', 'a\ud800.nc'):
            for api, entry in (('odata', odata_entry(Name=name)),
                               ('opensearch', resto_entry(title=name)),
                               ('stac', stac_entry(asset={'file:local_path': name}))):
                if api == 'stac' and ('/' in name or not name):
                    continue        # a path is what STAC gives; its last part is the name
                with self.subTest(api, name=name):
                    self.tell(space, api, page_of(api, entry))
                    with self.assertRaisesRegex(cso.CatalogueError, 'file name'):
                        self.inquire(space, {'timerange.end': '2026-01-01'}, api)
        self.assertEqual(self.files(), ['my.rc'])
        for name in ('a.nc', 'S6A_x.SEN6', 'a..b', 'K\xf6nigsberg.nc', 'console.nc'):
            with self.subTest(name):
                self.tell(space, 'odata', page_of('odata', odata_entry(Name=name)))
                self.assertEqual(self.names(space, {'timerange.end': '2026-01-01'}), [name])

    def test_what_services_say_reaches_the_user(self):
        space = self.use(DataSpace([]))
        for body, said in (
                ({'detail': 'Not Found'}, 'Not Found'),
                ({'detail': {'message': 'Invalid field: x'}}, 'Invalid field: x'),
                ({'detail': [{'type': 'less_than_equal', 'loc': ['query', '$skip'], 'input': '1e5',
                              'msg': 'Input should be less than or equal to 10000'}]},
                 r'Input should be less than or equal to 10000.*\$skip'),
                ({'detail': {'ErrorMessage': 'Validation error.', 'ErrorCode': 400, 'ErrorDetail': [
                    {'loc': ['maxRecords'], 'msg': 'Input should be less than 2000.'}]}},
                 r'Validation error.*Input should be less than 2000\..*maxRecords'),
                ({'detail': {'ErrorMessage': 'Unknown query parameter(s).', 'ErrorDetail': {
                    'loc': ['productsType'], 'msg': 'Query parameters do not exist.'}}},
                 'Unknown query.*do not exist.*productsType'),
                ({'detail': {'ErrorMessage': 'loadFromStore - Not Found', 'ErrorCode': 404}},
                 'loadFromStore - Not Found'),
                ({'code': 'NotFoundError', 'description': 'No such thing'}, 'No such thing'),
                ({'message': 'Malformed', 'code': 'DAT-ZIP-104'}, 'Malformed.*DAT-ZIP-104'),
                (b'<html><head><title>x</title><style>a{}</style></head><h1>Bad\n request</h1>',
                 r'Bad request\b'), (b'plain words', 'plain words'),
                ([['odd'], {'detail': None}], 'odd')):
            for api in APIS:
                with self.subTest(api, body=body):
                    self.tell(space, api, body, 400)
                    space.kinds.clear()
                    with self.assertRaises(cso.DataSpaceError) as caught:
                        self.search(space, api)
                    self.assertRegex(str(caught.exception), '400 Bad Request.*' + said)
                    self.assertNotIn('\n', str(caught.exception))
                    # OData is asked once more, without $select
                    self.assertEqual(space.count(api), 2 if api == 'odata' else 1)

    def test_other_missions_without_type(self):
        with DataSpace() as space:
            for api in APIS:
                with self.subTest(api):
                    names = self.names(space, {'collection': 'Sentinel2', 'producttype': ''}, api)
                    self.assertEqual(len(names), 3)
                    self.assertTrue(all(name.startswith('S2A_') for name in names))

    def test_requests_are_as_the_services_want_them(self):
        with DataSpace([CH4]) as space:
            for api in APIS:
                self.inquire(space, {'producttype': 'L2__CH4___', 'area': '0,40,10,50'}, api)
            asked = [(path.partition('?')[0], dict(urllib.parse.parse_qsl(path.partition('?')[2])))
                     for _, path, headers, _ in space.requests]
            self.assertFalse([path for _, path, headers, _ in space.requests
                              if 'Authorization' in headers])
        asked.reverse()         # so that a dict keeps the first of each
        query = dict(asked)['/odata/v1/Products']
        self.assertIn(query['$top'], ('250', '1000'))
        self.assertEqual(query['$orderby'], 'ContentDate/Start asc')
        for term in ("Collection/Name eq 'SENTINEL-5P'", "'productType'", "'L2__CH4___'",
                     'ContentDate/Start le 2025-01-01T00:00:00.000Z'):
            self.assertIn(term, query['$filter'])
        self.assertFalse([query for _, query in asked if '$count' in query or 'dataset' in query])
        query = dict(asked)['/resto/api/collections/Sentinel5P/search.json']
        self.assertEqual((query['sortParam'], query['sortOrder']), ('startDate', 'ascending'))
        self.assertRegex(query['startDate'], r'^2014-12-31T.*Z$')
        query = dict(asked)['/v1/search']
        self.assertIn('sentinel-5p-l2-ch4-offl', query['collections'])

    def test_a_service_that_does_not_select_is_asked_for_whole_entries(self):
        with DataSpace(RECORDS) as space:
            whole = self.names(space, {'producttype': 'L2__NO2___'})
            before = len(space.requests)
            space.faults.add('400', on='odata', times=1)
            self.assertEqual(self.names(space, {'producttype': 'L2__NO2___'}), whole)
            asked = ['$select' in urllib.parse.unquote(path)
                     for _, path, _, _ in space.requests[before:]]
            self.assertEqual(asked[:2] + asked[-1:], [True, False, False])

    def test_boxes_that_are_sent(self):
        day = datetime.datetime(2025, 1, 1)
        whole = (-180, -5, 180, 6)
        for area, boxes in (
                ('0,-89,40,-80', []), ('0,80,40,89', []), ('-30,30,35,76', []),
                ('-30,30,35,70', [(-35, 25, 40, 75)]), ('5,5,5,5', [(0, 0, 10, 10)]),
                ('170,-50,-170,50', [(165, -55, 180, 55), (-180, -55, -165, 55)]),
                ('0,0,360,1', [whole]), ('0,0,350,1', [whole])):
            query = cso.Query('', 'Sentinel5P', '', day, day, cso.Box.from_text(area), 'odata',
                              True)
            with self.subTest(area):
                self.assertEqual(cso.wider_boxes(query), boxes)

    def test_a_list_of_collections_in_many_pages(self):
        """Each page of it is no page of products that brings nothing new."""
        def tell(page):
            space.faults.add('told', 'stac', body=page)
        space, more = self.use(DataSpace([])), [{'rel': 'next', 'href': 'collections?page=2'}]
        for names, error in (('abcd', None), ('aad', 'nothing new')):
            with self.subTest(names), contextlib.ExitStack() as stack:
                space.faults.clear()
                for name in names[:-1]:
                    tell({'collections': [{'id': 'sentinel-2-' + name}], 'links': more})
                tell({'collections': [{'id': 'sentinel-2-' + names[-1]}]})
                if error:
                    stack.enter_context(self.assertRaisesRegex(cso.CatalogueError, error))
                self.assertEqual(self.inquire(space, {'collection': 'Sentinel2'}, 'stac'), [])
                self.assertIn('collections=' + ','.join('sentinel-2-' + name for name in names),
                              space.requests[-1][1])

    def test_types_and_collections_of_stac(self):
        """A name of its own is taken as it is; a body has its filter in JSON."""
        with DataSpace() as space:
            for collection, area in (('Sentinel2', ''), ('Sentinel2', '170,-80,-170,80'),
                                     ('Sentinel2', '170,-50,-170,50'), ('sentinel-2-l1c', '')):
                with self.subTest(collection, area=area):
                    names = self.names(space, {'collection': collection, 'area': area,
                                               'producttype': 'S2MSI1C'}, 'stac')
                    self.assertEqual(len(names), 0 if area else 2)

    def test_links_of_stac_that_are_merged(self):
        more, area = {'token': FIRST_PAGE}, {'area': '170,-50,-170,50', 'area.filter': 'server'}
        for merge in (True, False):
            with self.subTest(merge), DataSpace([]) as space:
                space.faults.add('told', 'stac', body=dict(page_of('stac', stac_entry()), links=[{
                    'rel': 'next', 'href': 'search', 'method': 'POST', 'merge': merge,
                    'body': more}]))
                self.inquire(space, area, 'stac')
                first, second = [json.loads(body.decode()) for _, _, _, body in space.requests]
                self.assertEqual(second, dict(first, **more) if merge else more)


class PagingTest(CatalogueCase):
    """A list is complete, or there is an error and the old table stays."""

    FULL, ERROR = 'full', 'error'
    FAULTS = (          # kind, how often (None: for ever), details, how it ends
        ('429', 1, {}, FULL), ('429', 2, {'retry_after': 7}, FULL),
        ('429', 1, {'retry_after': 'date', 'seconds': 30}, FULL),
        ('503', 2, {}, FULL), ('503', None, {}, ERROR),
        ('html', 1, {}, FULL), ('html', None, {}, ERROR), ('empty', 1, {}, FULL),
        ('json', None, {}, ERROR), ('cut', 1, {}, FULL),
        ('rst', 1, {}, FULL), ('drop', 1, {}, FULL), ('drop', None, {}, ERROR),
        ('400', 2, {}, ERROR),
        ('short-page', 1, {}, FULL), ('short-page', None, {}, FULL),
        ('empty-page', None, {}, ERROR), ('repeat', None, {}, ERROR),
        ('repeat', None, {'same_link': True}, ERROR))

    def test_faults_on_first_middle_and_last_page(self):
        self.small_pages()
        with DataSpace(list(made_products(25, checksum='')), keep_pages=True) as space:
            for api in APIS:
                whole = self.table(space, {}, api)
                pages = space.count(api)
                self.assertGreater(pages, 2)
                self.assertEqual(whole.count(b'\n'), 26)
                for kind, times, detail, expected in self.FAULTS:
                    for page in (0, pages // 2, pages - 1):
                        with self.subTest(api, kind=kind, times=times, page=page, **detail):
                            space.faults.clear()
                            fault = space.faults.add(kind, api, times, page, **detail)
                            self.run_into(space, api, whole, expected)
                            self.assertGreater(fault.taken, 0)
                            if 'retry_after' in detail:
                                self.assertGreater(min(self.waits), 6)
                space.faults.clear()
                space.kinds.clear()

    def run_into(self, space, api, whole, expected):
        """Inquire and look at the end, the table, the warnings and the folder."""
        self.write('table.csv', 'old')
        del self.waits[:]
        with mock.patch.object(cso.log, 'warning') as warning:
            try:
                table, ended = self.table(space, {}, api, retry=cso.Retry(3, 5, 600)), self.FULL
                self.assertEqual(warning.call_count, len(self.waits))
            except cso.DataSpaceError as error:
                table, ended = self.read('table.csv'), self.ERROR
                self.assertIn('127.0.0.1', str(error))
        self.assertEqual((ended, table), (expected, whole if expected == self.FULL else b'old'))
        self.assertEqual(self.files(), ['my.rc', 'table.csv'])

    def test_stalls(self):
        self.small_pages(5)
        with DataSpace(made_products(12)) as space:
            whole = self.table(space)
            for kind in ('stall-body', 'stall-headers'):
                space.faults.add(kind, 'odata', after=1)
                with self.subTest(kind):
                    self.assertEqual(self.table(space, timeout=0.1), whole)
            space.faults.add('stall-body', 'odata', None, after=1)
            with self.assertRaises(cso.HttpError):
                self.table(space, timeout=0.1, retry=cso.Retry(2, 0))

    def test_pages_that_never_end(self):
        """A server that gives the same page whatever is asked, with and without other links."""
        self.small_pages(2)
        self.write('table.csv', 'old')
        entries = [odata_entry(Id='%08d' % k + UUID[8:]) for k in range(2)]
        pages = {'odata': {'value': entries, '@odata.nextLink': 'http://127.0.0.1/next'},
                 'opensearch': {'type': 'FeatureCollection', 'features': [resto_entry()] * 2,
                                'properties': {'links': [{'rel': 'next', 'href': 'x'}]}},
                 'stac': {'type': 'FeatureCollection', 'features': [stac_entry()],
                          'links': [{'rel': 'next', 'href': 'search?token=x'}]}}
        for api, page in pages.items():
            for start in (0, 2):
                with self.subTest(api, start=start), DataSpace(made_products(9)) as space:
                    space.faults.add('told', api, None, start, body=page)
                    with self.assertRaisesRegex(cso.CatalogueError, 'brings nothing new|can.t be'):
                        self.inquire(space, {}, api)
                    self.assertLess(space.count(api), 12)
                    self.assertEqual(self.read('table.csv'), b'old')

    def test_links_that_lead_nowhere_are_not_needed(self):
        """OData leaves nextLink out beyond 10,000: no link does not mean that all is there."""
        self.small_pages(5)
        for limit in (None, 3, 2):
            for records in (made_products(23), copies(23), list(
                    made_products(3, '2017-01-01T00:00:00')) + copies(20)):
                with DataSpace(records, page_limit=limit) as space:
                    for api in ('odata', 'opensearch'):
                        with self.subTest(api, page_limit=limit):
                            space.faults.add('no-link', api, None)
                            self.assertEqual(len(self.inquire(space, {}, api)), 23)
        with DataSpace([]) as space:
            self.tell(space, 'odata', {'value': [odata_entry()], '@odata.nextLink': None})
            self.assertEqual(len(self.search(space, 'odata')), 1)

    def test_pages_that_were_not_asked_for(self):
        """An empty, old, later or unsorted page in the place of another: the list would look whole."""
        def entry(api, number):         # starts as made product `number` does
            start = (datetime.datetime(2018, 7, 1, 0, 34, 45)
                     + datetime.timedelta(seconds=6090 * number)).isoformat() + 'Z'
            return odata_entry(ContentDate={'Start': start, 'End': start}) if (
                api == 'odata') else resto_entry(startDate=start, completionDate=start)

        self.small_pages()
        self.write('table.csv', 'old')
        with DataSpace(made_products(35)) as space:
            for api, numbers, page in itertools.product(('odata', 'opensearch'), (
                    (), (0,), (20,), (5000,), (9, 30, 20)), (1, 3)):
                with self.subTest(api, page=page, numbers=numbers):
                    space.faults.clear()
                    space.faults.add('told', api, 1, page, body=page_of(
                        api, *[entry(api, number) for number in numbers]))
                    with self.assertRaises(cso.DataSpaceError):
                        self.inquire(space, {}, api)
                    self.assertEqual(self.read('table.csv'), b'old')
        with DataSpace(copies(35)) as space:
            for api, page in itertools.product(('odata', 'opensearch'), (1, 2, 4)):
                with self.subTest(api, page=page), self.assertRaises(cso.DataSpaceError):
                    space.faults.clear()
                    space.faults.add('told', api, 1, page, body=page_of(api))
                    self.inquire(space, {}, api)

    def test_many_products_with_one_start(self):
        for count, size, limit in ((1500, 1000, None), (150, 10, None), (40, 30, 7), (10, 10, None),
                                   (20, 10, None), (11, 10, None)):
            self.small_pages(size)
            around = list(made_products(3, '2017-01-01T00:00:00')) + list(
                made_products(3, '2019-01-01T00:00:00'))
            records = around + copies(count)
            with DataSpace(records, page_limit=limit) as space:
                for api in APIS:
                    with self.subTest(api, count=count, size=size, limit=limit):
                        rows = self.inquire(space, {}, api)
                        self.assertEqual(sorted(row.product_id for row in rows),
                                         sorted(record.id for record in records))

    def test_more_with_one_start_than_can_be_skipped(self):
        self.write('table.csv', 'old')
        with DataSpace(copies(11500)) as space:
            with self.assertRaisesRegex(cso.CatalogueError, 'start at 2018-07-01 00:34:45'):
                self.inquire(space)
        self.assertEqual(self.read('table.csv'), b'old')

    def test_duplicates(self):
        self.small_pages(4)
        records = list(made_products(20))
        for repeated in (records[3:4], records[2:7], records, records[:1] * 3, records[-1:] * 3):
            with DataSpace(records + list(repeated)) as space:
                for api in APIS:
                    with self.subTest(api, repeated=len(repeated)):
                        self.assertEqual(len(self.inquire(space, {}, api)), 20)
        twins = [s5p(CH4.name), s5p(CH4.name[:-5] + '1.nc')]       # other names, all else the same
        with DataSpace(twins) as space:
            for api in APIS:
                self.assertEqual(len(self.inquire(space, {'producttype': 'L2__CH4___'}, api)), 2)

    def test_no_page_is_kept(self):
        self.small_pages()
        marks = {'odata': 'ContentDate', 'opensearch': 'startDate', 'stac': 'assets'}
        with DataSpace(made_products(65)) as space:
            for api, mark in marks.items():
                query = cso.Query(getattr(space, api), 'Sentinel5P', 'L2__NO2___',
                                  datetime.datetime(2018, 1, 1), datetime.datetime(2019, 1, 1))
                for count, _ in enumerate(cso.search(query, self.session(space)), 1):
                    if count % 10 == 5:
                        entries = [thing for thing in gc.get_objects()
                                   if type(thing) is dict and mark in thing]
                        self.assertLessEqual(len(entries), 20, api)
                self.assertEqual(count, 65)

    def test_long_list_in_little_memory(self):
        """12,000 products: OData refuses to skip over 10,000, and leaves the link out there."""
        count = 12000
        with DataSpace(made_products(count, step_seconds=60, checksum='')) as space:
            rcfile = self.rc(space, {'output.columns': 'product_id'})
            out = subprocess.check_output(
                python(OURS, 'inquire', rcfile), timeout=90, stderr=subprocess.DEVNULL,
                env=dict(os.environ, PYTHONPATH=HERE))
            self.assertLess(space.count('odata'), count / 1000 + 4)
        self.assertEqual(len(set(self.read('table.csv').split())), 1 + count)
        self.assertLess(float(out.decode()), 61)


class RetiredTest(CatalogueCase):
    """The OpenSearch service was switched off on 2 March 2026."""

    MODES = '404', '410', '301', 'html', 'json', 'empty', '503', 'drop', 'refused'

    def setUp(self):
        super().setUp()
        self.space = self.use(DataSpace(one_day()))
        self.use(names_on_loopback({CATALOGUE: self.space}))
        self.expected = self.table(self.space)

    def retire(self, how):
        self.space.faults.clear()
        self.space.opensearch_mode = 'retired-' + how
        if how == 'drop':
            self.space.faults.add('drop', 'opensearch', None)
        if how == 'refused':
            real, refused = socket.getaddrinfo, iter([ConnectionRefusedError(111, 'refused')] * 2)

            def lookup(*args, **kwargs):
                for error in refused:
                    raise error
                return real(*args, **kwargs)
            self.use(mock.patch('socket.getaddrinfo', lookup))

    def test_on_the_own_host_odata_answers_instead(self):
        for how in self.MODES:
            with self.subTest(how), self.logged('WARNING') as logged:
                self.retire(how)
                del self.waits[:]
                table = self.table(self.space, {'url': 'http://%s/resto/api' % CATALOGUE})
                self.assertEqual(table, self.expected)
            retired, = [text for text in logged if 'retired' in text]
            self.assertIn('http://%s/odata/v1' % CATALOGUE, retired)
            self.assertEqual(len(logged), 1 + len(self.waits))
            self.assertLessEqual(len(self.waits), 1)

    def test_asked_for_by_name_it_is_an_error(self):
        self.write('table.csv', 'old')
        reasons = {'301': 'DOCTYPE', 'html': 'DOCTYPE', 'empty': '0 bytes', 'drop': 'resto',
                   'json': 'no list'}      # the others say their own word
        for how in self.MODES:
            for url, api in ((self.space.opensearch, 'auto'), (self.space.opensearch, 'opensearch'),
                             ('http://%s/resto/api/' % CATALOGUE, 'opensearch')):
                if how == 'refused' and '127.0.0.1' in url:
                    continue
                with self.subTest(how, url=url, api=api):
                    self.retire(how)
                    with self.assertRaises(cso.DataSpaceError) as caught:
                        self.table(self.space, {'url': url, 'api': api}, retry=cso.Retry(2, 0))
                    self.assertRegex(str(caught.exception),
                                     reasons.get(how, how) + '.*(url|api) to ')
                    self.assertEqual(self.read('table.csv'), b'old')

    def test_on_a_later_page_it_is_an_error(self):
        self.small_pages(5)
        for how in ('404', 'html', '503'):
            self.space.opensearch_mode = 'on'
            self.space.faults.clear()
            self.space.faults.add(how, 'opensearch', None, after=1)
            with self.subTest(how), self.assertRaises(cso.DataSpaceError):
                self.table(self.space, {'url': 'http://%s/resto/api' % CATALOGUE})
            self.assertEqual(self.read('table.csv'), self.expected)

    def test_when_odata_fails_too_it_is_an_error(self):
        self.retire('410')
        self.space.faults.add('400', 'odata', text='Invalid value', times=2)
        with self.assertRaisesRegex(cso.HttpError, 'odata.*Invalid value'):
            self.table(self.space, {'url': 'http://%s/resto/api' % CATALOGUE})


class InquireTest(CatalogueCase):
    """Settings in, table out: period, area, selection, and what is said about bad settings."""

    DOCUMENTED = """
    ! period
    cso.s5p.no2.timerange.start  :  2018-06-01 00:00
    cso.s5p.no2.timerange.end    :  2022-06-30 23:59
    cso.s5p.no2.url              :  https://catalogue.dataspace.copernicus.eu/resto/api
    cso.s5p.no2.collection       :  Sentinel5P
    cso.s5p.no2.producttype      :  L2__NO2___
    cso.s5p.no2.area             :  -30,30,35,76
    cso.s5p.no2.download_url     :  ZIPPER
    cso.s5p.no2.output.file      :  ${my.work}/PAL_S5P_NO2_%Y-%m-%d.csv
    cso.s5p.no2.dmode            :  0o775
    """.replace('\n    ', '\n').replace('ZIPPER', ZIPPER % '{product_id}')

    def test_documented_settings_file(self):
        no2 = s5p('S5P_PAL__L2__NO2____20211206T140554_20211206T154724_21497_02_020301_'
                  '20211208T050000.nc', '2021-12-06T14:27:28Z', '2021-12-06T15:25:50Z')
        expected = {'NO2': HEADER + '21497;2021-12-06 14:05:54;2021-12-06 15:47:24;PAL_;02;020301;'
                                    '%s;%s\n' % (no2.name, ZIPPER % no2.id),
                    'CH4': HEADER + CH4_ROW}
        os.environ['SSL_CERT_FILE'], tls = certificate(self.folder, [CATALOGUE])
        for mode, warnings in (('on', 0), ('retired-410', 1)):
            with DataSpace([CH4, no2], tls=tls, opensearch=mode) as space, \
                    names_on_loopback({CATALOGUE: space}):
                for species, table in expected.items():
                    with self.subTest(species, mode=mode), self.logged('WARNING') as logged:
                        work = self.path(mode, species)
                        rcfile = self.write('doc.rc', self.DOCUMENTED.replace(
                            'L2__NO2', 'L2__' + species))
                        done = cso.CSO_DataSpace_Inquire(rcfile, 'cso.s5p.no2', {'my.work': work})
                        name, = os.listdir(work)
                        self.assertRegex(name, r'^PAL_S5P_NO2_20\d\d-\d\d-\d\d\.csv$')
                        self.assertEqual(self.read(work, name).decode(), table)
                        self.assertEqual((len(done.rows), space.count('odata') > 0),
                                         (1, mode != 'on'))
                    self.assertEqual(len(logged), warnings)

    def test_bad_settings(self):
        mistakes = (    # setting, value (None: not there), what is said beside setting and place
            ('url', None, 'missing'), ('producttype', None, 'missing'),
            ('collection', None, 'missing'), ('timerange.start', None, 'missing'),
            ('output.file', None, 'missing'), ('timerange.start', '2018-13-01', "'2018-13-01'"),
            ('timerange.end', 'now', 'yyyy-mm-dd'), ('timerange.end', '2001-01-01', 'before'),
            ('producttype', 'L2__NO2__', 'L2__NO2___'),
            ('producttype', 'L2__NO2____', 'L2__NO2___'), ('producttype', 'NO2', 'L2__NO2___'),
            ('producttype', 'CH4', 'L2__CH4___'), ('producttype', 'ch4', 'L2__CH4___'),
            ('producttype', 'L2__CO', 'L2__CO____'), ('producttype', 'SO2', 'L2__SO2___'),
            ('producttype', 'HCHO', 'L2__HCHO__'), ('producttype', 'CLOUD', 'L2__CLOUD_'),
            ('collection', 'Sentinl5P', 'expected S'), ('collection', '../x', 'expected S'),
            ('area', '35,30,-30', 'west,south,east,north'), ('area', '-30,76,35,30', 'south'),
            ('area', '30,-30,76,135', '90'), ('area', 'Europe', 'west,south,east,north'),
            ('area', '-400,0,1,1', '360'), ('area.minimum', '101', '0 to 100'),
            ('area.minimum', 'half', "'half'"), ('area.filter', 'remote', 'local or server'),
            ('api', 'rest', 'odata'), ('url', 'catalogue.dataspace.copernicus.eu', 'https://'),
            ('url', 'https://example.org/api', 'api'),
            ('url', 'https://me:secret@example.org/odata', "'...@example.org/odata'"), ('best', 'maybe', "'maybe'"),
            ('download_url', 'https://example.org/Products()/$value', '{product_id}'),
            ('download_url', '{product_id}', 'no url'),
            ('output.geojson', '${my.output.file}', 'another file'),
            ('output.columns', 'orbit;md6', 'md6'), ('selection', '%{orbit} ==', 'expression'),
            ('selection', "__import__('os')", '__import__'), ('dmode', 'rwx', 'octal'),
            ('download.maxtry', '0', '1 or more'), ('download.connections', '0', '1 to 20'),
            ('download.connections', '21', '1 to 20'), ('timeout', '-5', '0.01 to 1e+06'))
        space = self.use(DataSpace([CH4]))
        for name, value, said in mistakes:
            with self.subTest(name, value=value):
                rcfile = self.rc(space, {'producttype': 'L2__CH4___', name: value})
                before = self.files()
                status, out, err = self.run_main('inquire', rcfile, '--rcbase', 'my')
                self.assertEqual((status, out), (1, ''), err)
                self.assertEqual(len(err.strip().split('\n')), 1, err)
                place = rcfile
                if value is not None:
                    before_it = self.read('my.rc').decode().partition('my.%s :' % name)[0]
                    place += ':%d' % (1 + before_it.count('\n'))
                self.assertRegex(err, r'%s: (my\.)?%s: ' % (re.escape(place), re.escape(name)))
                self.assertIn(said, err)
                self.assertEqual(self.files(), before)

    def test_unknown_collection_of_the_service(self):
        self.write('table.csv', 'old')
        with DataSpace() as space:
            for api in APIS:
                with self.subTest(api), self.assertRaisesRegex(
                        cso.DataSpaceError, 'Landsat9|Invalid'):
                    self.inquire(space, {'collection': 'Landsat9'}, api)
        self.assertEqual(self.read('table.csv'), b'old')

    def test_who_filters_by_area_first(self):
        with DataSpace() as space:
            for collection, place, asked in (('Sentinel5P', '', False), ('Sentinel2', '', True),
                                             ('Sentinel5P', 'server', True),
                                             ('Sentinel2', 'local', False)):
                with self.subTest(collection, place=place):
                    self.inquire(space, {'collection': collection, 'area': '0,0,10,10',
                                         'area.filter': place})
                    self.assertEqual('Intersects' in space.requests[-1][1], asked)

    def test_types_of_other_missions_pass_as_they_are(self):
        with DataSpace() as space:
            for producttype in ('S2MSI1C', "it's"):
                self.inquire(space, {'collection': 'Sentinel2', 'producttype': producttype})
                asked = urllib.parse.unquote(space.requests[-1][1])
                self.assertIn("eq '%s'" % producttype.replace("'", "''"), asked)

    def test_period_is_that_of_the_measurement(self):
        name = 'S5P_OFFL_L2__NO2____20180701T%s_20180702T%s_03700_01_010002_20180708T000000.nc'
        midnight = s5p(name % ('231500', '005600'), '2018-07-01T23:36:40Z', '2018-07-02T00:34:30Z')
        later = s5p(name % ('234500', '012600'), '2018-07-02T00:06:40Z', '2018-07-02T01:04:30Z')
        edge = s5p(name % ('000000', '000001'), '2018-07-03T00:00:00Z', '2018-07-03T00:50:00Z')
        letters = {midnight.name: 'm', later.name: 'l', edge.name: 'e'}
        with DataSpace([midnight, later, edge]) as space:
            for api in APIS:
                for start, end, expected in (       # ends included
                        ('2018-06-30', '2018-06-30 23:59:59', ''),
                        ('2018-07-01', '2018-07-01 23:59:59', 'm'),
                        ('2018-07-02', '2018-07-02 23:59:59', 'lm'),
                        ('2018-07-03', '2018-07-03 23:59:59', 'e'),
                        ('2018-07-02 01:04:30', '2018-07-02 02:00', 'l'),
                        ('2018-07-02 01:04:31', '2018-07-02 02:00', ''),
                        ('2018-07-02 12:00', '2018-07-03 00:00', 'e'),
                        ('2018-07-02 12:00', '2018-07-02 23:59:59', ''),
                        ('2018-07-02 00:10', '2018-07-02 00:10', 'lm')):
                    found = self.names(space, {'timerange.start': start, 'timerange.end': end}, api)
                    with self.subTest(api, start=start, end=end):
                        self.assertEqual(''.join(sorted(letters[name] for name in found)), expected)

    def test_periods_that_no_millisecond_ends(self):
        one, begin = made_products(1)[0], datetime.datetime(2018, 7, 1, 0, 0, 0, 999)
        for start, end in (('2018-07-01T23:59:59.999700Z', '2018-07-02T00:30:00Z'),
                           ('2018-06-30T00:00:00.000100Z', '2018-07-01T00:30:00Z')):
            with DataSpace([one._replace(start=as_time(start), end=as_time(end))]) as space:
                for api, (first, last) in itertools.product(APIS, (
                        (begin, datetime.datetime(2018, 7, 1, 23, 59, 59, 999999)),
                        (datetime.datetime.min, datetime.datetime.max))):
                    query = cso.Query(getattr(space, api), 'Sentinel5P', 'L2__NO2___', first, last)
                    with self.subTest(api, start=start, first=first):
                        found = cso.in_period(cso.search(query, self.session(space)), query)
                        self.assertEqual(len(list(found)), 1)

    def test_products_that_began_long_before(self):
        orbit = made_products(1)[0]._replace(
            name='S1A_OPER_AUX_POEORB_x.EOF', collection='SENTINEL-1', producttype='AUX_POEORB',
            start=as_time('2024-01-01T22:59:42'), end=as_time('2024-01-03T00:59:42'))
        days = orbit._replace(
            name='S5P_OFFL_L2__O3_TCL_20231230T000000_20240103T235959_32190_03_020601_'
                 '20240112T000000.nc', collection='SENTINEL-5P', producttype='L2__O3_TCL',
            start=as_time('2023-12-30T00:00:00'), end=as_time('2024-01-03T23:59:59'))
        for record, api in itertools.product((orbit, days), ('odata', 'opensearch')):
            with self.subTest(record.producttype, api=api), DataSpace([record]) as space:
                self.assertEqual(self.names(space, {
                    'collection': record.collection, 'producttype': record.producttype,
                    'timerange.start': '2024-01-03', 'timerange.end': '2024-01-04'}, api),
                    [record.name])

    @unittest.skipUnless(hasattr(time, 'tzset'), 'no tzset here')
    def test_local_time_changes_nothing(self):
        tables = set()
        with DataSpace(made_products(40, '2018-03-24T00:10:00')) as space:
            try:
                for zone in ('UTC', 'CET-1CEST,M3.5.0,M10.5.0/3', 'PST8PDT,M3.2.0,M11.1.0',
                             'IST-5:30'):
                    with mock.patch.dict(os.environ, TZ=zone):
                        time.tzset()
                        tables.add(self.tables(space, {'timerange.start': '2018-03-25 01:30',
                                                       'timerange.end': '2018-03-25 03:30'}))
            finally:
                time.tzset()
        table, = tables
        self.assertIn('\n02308;2018-03-25 01:32:30;', table)
        self.assertEqual(table.count('\n'), 1 + 1, table)

    def kept(self, space, settings, step, said):
        """Names of an inquiry of which one step is logged in one line that matches."""
        with self.logged() as logged:
            names = self.names(space, settings)
        line, = [text for text in logged if text.startswith(step)]
        self.assertRegex(line, said)
        return names

    def test_selection(self):
        wanted = "%{processing} in ['RPRO','OFFL'] and %{collection} == '03'"
        records = [s5p('S5P_%s_L2__NO2____2020010%dT023416_2020010%dT041546_%05d_%s_020400_'
                       '20221120T003820.nc' % (stream, day, day, 100 + day, collection))
                   for day, (stream, collection) in enumerate((
                       ('RPRO', '03'), ('OFFL', '03'), ('OFFL', '01'), ('NRTI', '03')), 1)]
        with DataSpace(records) as space:
            for text, kept in ((wanted, '21'), ("'%{processing}' == 'NRTI'", '4'),
                               ("%{orbit} == '00103'", '3'),
                               ("not %{orbit}.startswith('0010')", ''),
                               ("%{processor_version} >= '020400'", '4321'),
                               ("int(%{orbit}) % 2 == 0", '42'),
                               ("%{start_time} < '2020-01-03'", '21'),
                               ("%{processing} \\!= 'NRTI'", '321')):
                with self.subTest(text):
                    names = self.kept(space, {'selection': text}, 'selection', (
                        '%d kept, %d dropped' % (len(kept), 4 - len(kept))))
                    self.assertEqual(''.join(name[27] for name in names), kept)
            for text, said in (("%{colection} == '03'", 'colection.*orbit'),
                               ("%{processing} != 'NRTI'", '!=')):      # here ! begins a comment
                with self.subTest(text), self.assertRaisesRegex(
                        cso.SettingsError, r'my\.rc:\d+: selection: .*' + said):
                    self.inquire(space, {'selection': text})

    def test_best(self):
        name = 'S5P_%s_L2__NO2____20200101T%s_20200101T%s_%s_%s_%s_20%s.nc'
        whole, part1, part2 = ('023416', '041546'), ('024000', '024500'), ('024500', '025000')
        names = [name % ((stream,) + times + (orbit, collection, version, made))
                 for stream, times, orbit, collection, version, made in (
            ('RPRO', whole, '00001', '03', '020400', '221120T003820'),      # kept: version, time
            ('RPRO', whole, '00001', '03', '020400', '221120T003819'),
            ('RPRO', whole, '00001', '03', '020301', '231120T003820'),
            ('RPRO', whole, '00001', '02', '020500', '231120T003820'),
            ('OFFL', whole, '00001', '03', '020800', '241120T003820'),
            ('NRTI', part1, '00001', '03', '020800', '241120T003820'),
            ('NRTI', part1, '00002', '01', '010000', '200101T050000'),      # kept: no other
            ('NRTI', part2, '00002', '01', '010000', '200101T050000'),
            ('NRTI', part2, '00002', '01', '010000', '200101T060000'),      # kept: made later
            ('OFFL', whole, '00003', '02', '010302', '200101T050000'),      # kept: collection
            ('OFFL', whole, '00003', '01', '010302', '200101T050000'))]
        with DataSpace([s5p(name) for name in names]) as space:
            found = self.kept(space, {'best': 'True'}, 'best', '4 kept, 7 dropped .*RPRO')
            self.assertEqual(found, [names[k] for k in (8, 6, 9, 0)])       # newest first
            self.assertEqual(len(self.names(space, {'best': 'False'})), 11)
            self.assertEqual(len(self.names(space)), 11)
            found = self.names(space, {'best': 'True', 'selection': "%{processing} \\!= 'RPRO'"})
            self.assertEqual(set(found), {names[k] for k in (4, 6, 8, 9)})
        aux = [record for record in RECORDS if record.producttype == 'AUX_CTMANA']
        with DataSpace(aux) as space:      # names without an orbit
            self.assertEqual(len(self.names(space, {'best': 'T', 'producttype': 'AUX_CTMANA'})), 2)
        twins = [self.row_of(id) for id in 'ab']        # the same one, whatever the service's order
        self.assertEqual(cso.best_rows(twins), cso.best_rows(twins[::-1]))

    def row_of(self, id):
        day = datetime.datetime(2025, 3, 11)
        return cso.row_of(cso.Product(id, NO2, 'L2__NO2___', day, day), '{product_id}')

    def test_area(self):
        def covering(day, east, geometry=True):
            ring = '-5,-5 %s,-5 %s,15 -5,15 -5,-5' % (east, east)
            return s5p('S5P_OFFL_L2__NO2____2020010%dT023416_2020010%dT041546_11488_03_020400_'
                       '20221120T003820.nc' % (day, day), geometry=geometry and typed_geometry(
                           'Polygon', ring))
        records = [covering(1, 15), covering(2, 5), covering(3, 0.5), covering(4, -1),
                   covering(5, 0, None)]
        with DataSpace(records) as space:
            for minimum, kept, said in (
                    (0, '5321', '4 kept, 1 dropped .1 outside'),
                    (5, '5321', '4 kept'), (5.1, '521', '3 kept, 2 dropped .*5.1'),
                    (50, '521', '3 kept'), (50.1, '51', '2 kept, 3 dropped'),
                    (100, '51', '2 kept')):
                with self.subTest(minimum):
                    names = self.kept(space, {'area': '0,0,10,10', 'area.minimum': minimum}, 'area',
                                      said)
                    self.assertEqual(''.join(name[27] for name in names), kept)
            rows = self.inquire(space, {'area': '0,0,10,10', 'output.columns': 'orbit overlap'})
            self.assertEqual([row.overlap for row in rows], ['', '5.00', '50.00', '100.00'])
            self.assertEqual(len(self.names(space)), 5)

    def test_missing_footprints_are_a_warning_only_where_there_should_be_one(self):
        with DataSpace() as space, self.logged('WARNING') as logged:
            names = self.names(space, {'producttype': 'L2__O3_TCL', 'area': '-30,30,35,76'})
            self.assertEqual(len(names), 3)
            self.assertEqual(names, self.names(space, {
                'producttype': 'L2__O3_TCL', 'area': '40,40,41,41', 'area.filter': 'server'}))
        self.assertEqual(logged, [])
        with DataSpace([s5p(NO2, geometry=None)]) as space, self.logged('WARNING') as logged:
            self.inquire(space, {'area': '-30,30,35,76', 'timerange.end': '2026-01-01'})
        self.assertIn('footprints: 1 missing', *logged)

    def test_columns(self):
        with DataSpace([CH4._replace(content=321)]) as space:
            for text, header in (('orbit filename href', 'orbit;filename;href'),
                                 ('href;size, md5', 'href;size;md5'), ('', HEADER.strip()),
                                 ('producttype', 'producttype')):
                with self.subTest(text):
                    table = self.table(space, {'producttype': 'L2__CH4___', 'output.columns': text})
                    self.assertEqual(table.decode().split('\n')[0], header)
            columns = 'product_id,producttype,published,size,md5,overlap'
            table = self.table(space, {'producttype': 'L2__CH4___', 'output.columns': columns})
            self.assertEqual(table.decode().split('\n')[1], ';'.join((
                UUID, 'L2__CH4___', '2022-12-01T00:00:00.000000Z', '321', space.md5(CH4._replace(
                    content=321)), '')))

    def test_geojson(self):
        pacific = typed_geometry('Polygon', '170,0 -170,0 -170,10 170,10 170,0')
        names = [NO2.replace('20250311T1', '2025031%dT1' % day) for day in (1, 2, 3)]
        records = [s5p(name, geometry=geometry) for name, geometry in zip(
            names, (EUROPE, pacific, None))]
        with DataSpace(records) as space:
            for api in APIS:
                with self.subTest(api):
                    rows = self.inquire(space, {
                        'timerange.end': '2026-01-01', 'selection': "%{orbit} == '38393'",
                        'output.geojson': self.path('maps', 'x.geojson')}, api)
                    found = json.loads(self.read('maps', 'x.geojson').decode())
                    self.assertEqual(found['type'], 'FeatureCollection')
                    features = found['features']
                    self.assertEqual([feature['properties']['filename'] for feature in features],
                                     [row.filename for row in rows])
                    empty, cut, plain = [feature['geometry'] for feature in features]
                    self.assertIsNone(empty)
                    self.assertEqual((cut['type'], len(cut['coordinates'])), ('MultiPolygon', 2))
                    self.assertEqual(plain['type'], 'Polygon')
                    self.assertEqual(self.read('table.csv').count(b'\n'), 4)

    def test_nothing_found(self):
        with DataSpace([CH4]) as space:
            for api in APIS:
                with self.subTest(api), self.logged('WARNING') as logged:
                    table = self.table(space, {'area': '-30,30,35,76', 'output.geojson': (
                        self.path('x.geojson'))}, api)
                    self.assertIn(b'"features": []', self.read('x.geojson'))
                    self.assertEqual(table.decode(), HEADER)
                for word in ('nothing found', 'L2__NO2___', '2015-01-01', '-30,30,35,76',
                             space.url):
                    self.assertIn(word, *logged)

    def test_date_of_today_in_names(self):
        today = datetime.datetime(2026, 11, 5, 23, 59)
        with DataSpace([CH4]) as space:
            rcfile = self.rc(space, {'producttype': 'L2__CH4___', 'output.file': self.path(
                '%Y', 'CH4_%Y-%m-%d_%d%%.csv'), 'output.geojson': self.path('%j.geojson')})
            cso.inquire(cso.read_settings(rcfile), 'my', self.session(space), today=today)
        self.assertEqual(self.files(), sorted([
            os.path.join('2026', 'CH4_2026-11-05_05%%.csv'), '309.geojson', 'my.rc']))


class TableTest(CatalogueCase):
    """The csv table, written and read."""

    def test_written_as_documented(self):
        with DataSpace([CH4]) as space:
            table = self.table(space, {'producttype': 'L2__CH4___',
                                       'download_url': ZIPPER % '{product_id}'})
        self.assertEqual(table.decode(), HEADER + CH4_ROW)

    def test_order_and_zeros(self):
        """Newest start first, equal ones by file name; the first digits stay."""
        name = 'S5P_%s_L2__NO2____2018043%dT00%s50_20180430T020120_02818_01_%s_20220630T164539.nc'
        names = [name % parts for parts in (
            ('RPRO', 0, '20', '010105'), ('OFFL', 0, '19', '010000'), ('OFFL', 0, '19', '010002'),
            ('RPRO', 0, '19', '010105'), ('NRTI', 0, '18', '010000'))]
        with DataSpace([s5p(name) for name in reversed(names)]) as space:
            self.assertEqual(self.names(space), names)
        rows = cso.read_table(self.path('table.csv'))
        self.assertEqual([row.filename for row in rows], names)
        self.assertEqual(';'.join(rows[0][:6]),
                         '02818;2018-04-30 00:20:50;2018-04-30 02:01:20;RPRO;01;010105')
        ids = [UUID, UUID.replace('b3', 'b4')]
        with DataSpace([s5p(names[0], id=id) for id in reversed(ids)]) as space:
            self.assertEqual([row.product_id for row in self.inquire(space)], ids)

    def row(self, **fields):
        return cso.Row(**dict(dict.fromkeys(HEADER.strip().split(';'), ''),
                              filename=NO2, href=DOWNLOAD % UUID, **fields))

    def test_round_trip(self):
        rows = [self.row(), self.row(orbit='02818', size='12', md5=32 * 'a', overlap='12.50'),
                self.row(processing='é;"quoted"')]
        path = self.path('new', 'folders', 'table.csv')
        cso.write_table(rows, path, cso.Row._fields, dmode=0o750)
        self.assertEqual(cso.read_table(path), rows)
        data = self.read(path)
        self.assertNotIn(b'\r', data)
        self.assertIn('é'.encode('utf-8'), data)
        if os.name == 'posix':
            self.assertEqual(os.stat(self.path('new')).st_mode & 0o777, 0o750)
        cso.write_table(rows[:1], path)
        self.assertEqual(cso.read_table(path), rows[:1])
        self.assertEqual(self.files(), [os.path.join('new', 'folders', 'table.csv')])
        cso.write_table([], path)
        self.assertEqual((self.read(path).decode(), cso.read_table(path)), (HEADER, []))

    def test_tables_that_others_wrote(self):
        row = CH4_ROW.strip()
        expected = cso.Row(*row.split(';'))
        quoted = HEADER + ';'.join('"%s"' % field for field in row.split(';')) + '\n'
        turned = '\n'.join(';'.join(reversed(line.split(';'))) for line in (HEADER.strip(), row))
        for what, text in (('unix', HEADER + row + '\n'), ('no end', HEADER + row),
                           ('dos', (HEADER + row + '\n').replace('\n', '\r\n')),
                           ('bom', '\ufeff' + HEADER + row + '\n'), ('quoted', quoted),
                           ('turned', turned), ('blank lines', HEADER + '\n' + row + '\n\n'),
                           ('spaces', HEADER.replace(';', ' ; ') + row.replace(';', ' ; ')),
                           ('more columns', HEADER.replace('\n', ';notes\n') + row + ';\n')):
            with self.subTest(what):
                self.assertEqual(cso.read_table(self.write('t.csv', text)), [expected])
        few = self.row()._replace(filename='a.nc')
        for md5, known in (('a' * 32, 'a' * 32), ('A' * 32, 'a' * 32), ('N/A', '')):
            table = self.write('t.csv', 'href;md5;size;filename\n%s;%s;;a.nc\n' % (few.href, md5))
            self.assertEqual(cso.read_table(table), [few._replace(md5=known)])

    def test_broken_tables(self):
        good = HEADER + CH4_ROW
        for line, text, said in (
                (3, good + CH4_ROW.replace(';03;', ';'), '7 fields.*8'),
                (3, good + CH4_ROW.strip() + ';more\n', '9 fields.*8'),
                (4, good + CH4_ROW + '\n'.join(['11488']), '1 fields'),
                *((2, HEADER + CH4_ROW.replace(ZIPPER % UUID, href), 'no href') for href in (
                    '', 'www', 'https:///x', 'file:///etc/hosts', 'javascript:x', 'https://x/a b')),
                *((3, good + CH4_ROW.replace(CH4.name, name), 'file name') for name in (
                    '', '..', '../x.nc', '/tmp/x.nc', 'C:\\x.nc', 'a\\x.nc', 'x\x01.nc')),
                (2, 'filename;href;size\na.nc;https://x/;many\n', 'size'),
                (1, 'a;b\n1;2\n', 'filename and href'), (1, '', 'filename'),
                (1, HEADER.replace('href', 'url'), 'href'),
                (1, '<!DOCTYPE html>\n<html>\n', 'filename'), (1, '\n', 'filename'),
                (1, 'filename\nx.nc\n', 'href'), (3, good + '"' + CH4_ROW, '')):
            with self.subTest(said, text=text):
                path = self.write('t.csv', text)
                with self.assertRaisesRegex(cso.TableError, '(?s)^%s:%d: .*%s' % (
                        re.escape(path), line, said)):
                    cso.read_table(path)
        with open(self.path('t.csv'), 'wb') as out:
            out.write(HEADER.encode() + b'\xff\xfe\x00')
        for path in (self.path('t.csv'), self.path('missing.csv'), self.folder):
            with self.subTest(path), self.assertRaisesRegex(cso.TableError, re.escape(path)):
                cso.read_table(path)

    def test_files_in_the_way(self):
        self.write('file', 'x')
        for path in (self.path('file', 'table.csv'), self.folder):
            with self.subTest(path), self.assertRaises(cso.FileError):
                cso.write_table([self.row()], path)
        self.assertEqual(self.files(), ['file'])

    def test_a_name_that_stands_twice_is_fetched_once_from_its_first_row(self):
        rows = [self.row(), self.row()._replace(href=ZIPPER % UUID), self.row()]
        with self.logged('WARNING') as logged:
            task, = cso.tasks_of(rows)
        self.assertEqual((task.href, len(logged)), (rows[0].href, 1))

    def test_no_column_leads_out_of_the_folder(self):
        for orbit, expected in (('02818', 'data/02818'), ('', 'data/unknown'), ('..', None),
                                ('../..', None), ('/tmp', None), ('a\\b', None)):
            with self.subTest(orbit):
                rows = [self.row(orbit=orbit)]
                if expected:
                    self.assertEqual(cso.tasks_of(rows, 'data/%{orbit}')[0].path,
                                     os.path.join(expected, NO2))
                else:
                    with self.assertRaisesRegex(cso.TableError, 'file name'):
                        cso.tasks_of(rows, 'data/%{orbit}')

    def test_a_table_that_breaks_off_leaves_the_old_one(self):
        def rows():
            yield self.row()
            raise ValueError
        path = self.write('table.csv', 'old')
        self.assertRaises(ValueError, cso.write_table, rows(), path)
        self.assertEqual((self.read('table.csv'), self.files()), (b'old', ['table.csv']))


ORBITS = list(made_products(3))
TABLE_HEAD = "filename;href;size;md5"


def switch_on(space, text):
    """Switch faults on from a text such as "fin at=100, html times=None"."""
    for words in filter(None, text.split(", ")):
        kind, *details = words.split()
        details = (detail.split("=", 1) for detail in details)
        space.faults.add(kind, **{name: json.loads(value.replace("None", "null"))
                                  if re.match(r"[-\d.]+$|None$", value) else value
                                  for name, value in details})


def stand_in(faults="", records=ORBITS, **options):
    """A DataSpace in which faults are switched on from its beginning."""
    space = DataSpace(records, **options)
    switch_on(space, faults)
    return space


def ends_of_faults(text):
    """(faults, state, requests) from lines such as "verified after 2: fin at=1, html | drop"."""
    for state, requests, cases in re.findall(r"(?m)^(\S.*) after (\d): ((?:.*\n    )*.*)$", text):
        for faults in " ".join(cases.split()).split(" | "):
            yield faults, state, int(requests)


class DownloadCase(Case):
    """A test that looks at requests for bytes, and at what lies in the folder afterwards."""

    def setUp(self):
        Case.setUp(self)
        self.use(names_on_loopback({}))

    def new_folder(self):
        """Go on in an empty folder."""
        self.folder = tempfile.mkdtemp(dir=os.path.dirname(self.folder))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def afresh(self, *words, **more):
        """A subTest in an empty folder, before any wait."""
        with self.subTest(*words, **more):
            self.new_folder()
            self.waits = []
            yield

    def asked(self, space, record=None, kind="/$value"):
        """The (path, headers) of the requests for the bytes of a record, or of all."""
        return [(path, headers) for _, path, headers, _ in list(space.requests)
                if path.endswith(kind) and (record is None or record.id in path)]

    def known(self, space, record):
        return self.task(space, record, size=space.size(record), md5=space.md5(record))

    def assertRight(self, space, *records):
        for record in records:
            self.assertEqual(MD5(self.read(record.name)).hexdigest(), space.md5(record),
                             record.name)

    def assertNothingElse(self, *records):
        self.assertEqual(self.files(), sorted(record.name for record in records))

    def assertOnly(self, space, *records):
        """The files of these records are here and right, and nothing else is."""
        self.assertRight(space, *records)
        self.assertNothingElse(*records)

    def table(self, space, records, name="table.csv"):
        rows = ["%s;%s;%d;%s" % (record.name, space.href(record), space.size(record),
                                 space.md5(record)) for record in records]
        return self.write(name, "\n".join([TABLE_HEAD] + rows) + "\n")

    def account(self, space, **more):
        """Put the account of a stand-in into the environment of this process."""
        os.environ.update(dict(ENVIRON, CDSE_TOKEN_URL=space.token_url), **more)


class HttpTest(DownloadCase):
    """One exchange: who sees the token, where redirects lead, what is tried again and when."""

    def test_who_may_see_the_token(self):
        for expected, trusted, urls in (
                (True, (), "https://dataspace.copernicus.eu/x http://127.0.0.1:8000/x "
                 "https://download.dataspace.copernicus.eu/x http://localhost:8000/x "
                 "https://DOWNLOAD.DataSpace.Copernicus.EU:443/x http://[::1]:8000/x"),
                (True, ("zipper.creodias.eu",), "https://zipper.creodias.eu/x"),
                (False, ("zipper.creodias.eu",), "https://other.creodias.eu/x "
                 "http://zipper.creodias.eu/x"),
                (False, (), "https://zipper.creodias.eu/x https://copernicus.eu/x "
                 "http://download.dataspace.copernicus.eu/x https://evildataspace.copernicus.eu/x "
                 "ftp://download.dataspace.copernicus.eu/x http://127.0.0.1.evil.org/x "
                 "https://dataspace.copernicus.eu.evil.org/x http://localhost.evil.org/ "
                 "https://evil.org/dataspace.copernicus.eu "
                 "https://evil.org?https://dataspace.copernicus.eu "
                 "https://dataspace.copernicus.eu@evil.org/x")):
            for url in urls.split():
                with self.subTest(url, trusted=trusted):
                    self.assertEqual(bool(cso.may_see_token(url, trusted)), expected)

    def test_what_of_a_url_is_shown(self):
        for url, expected in (
                ("https://me:secret@host.eu:80/a/b?token=secret#secret", "https://host.eu:80/a/b"),
                ("http://secret@host.eu", "http://host.eu"), ("words", "'words'")):
            with self.subTest(url):
                self.assertEqual(cso.shown(url), expected)

    def test_an_id_that_is_none_is_not_tried_again(self):
        with DataSpace(ORBITS) as space:
            task = cso.Task(space.odata + "/Products(x)/$value", self.path("x.nc"))
            with self.assertRaisesRegex(cso.HttpError, "is not a valid UUID") as caught:
                cso.fetch(task, self.session(space))
            self.assertEqual((caught.exception.status, self.waits, self.files()), (422, [], []))

    def test_waits_grow_up_to_their_bound(self):
        with stand_in("503 times=6") as space:
            cso.fetch(self.task(space, ORBITS[0]), self.session(space, retry=cso.Retry(9, 2, 40)))
            self.assertRight(space, ORBITS[0])
        self.assertEqual(len(self.waits), 6)
        for k, wait in enumerate(self.waits):
            self.assertLessEqual(min(40, 2 * 2 ** k), wait)
            self.assertLessEqual(wait, min(40, 2 * 2 ** k * 1.25))
        self.assertGreater(len({cso.Retry(10, 5, 600).wait(3) for _ in range(20)}), 10, "jitter")

    def test_retry_after(self):
        for text, low, high in (
                ("429 retry_after=7", 7, 7), ("503 retry_after=7", 7, 7),
                ("429 retry_after=date seconds=60", 55, 61), ("429", 1, 1),
                ("429 retry_after=0", 1, 1), ("503 retry_after=soon", 1, 1),
                ("429 retry_after=date seconds=-60", 1, 1), ("429 retry_after=500", 500, 500)):
            with self.afresh(text), stand_in(text) as space:
                cso.fetch(self.task(space, ORBITS[0]),
                          self.session(space, retry=cso.Retry(3, 1, 9)))
                self.assertRight(space, ORBITS[0])
                self.assertEqual(len(self.waits), 1)
                self.assertTrue(low <= self.waits[0] <= 1.25 * high, self.waits)
        with stand_in("429 times=None retry_after=86400") as space:         # not tried again
            with self.assertRaisesRegex(cso.HttpError, "86400"):
                cso.fetch(self.known(space, ORBITS[1]), self.session(space))
            self.assertEqual((space.count("value"), len(self.waits)), (1, 1), "not one more")

    def test_redirects_on_one_host(self):
        with DataSpace(ORBITS) as space:
            session, task = self.session(space), self.known(space, ORBITS[0])
            for status in (301, 302, 303, 307, 308):
                for to in ("{target}", "//localhost:%d{target}" % space.port,
                           "http://localhost:%d{target}" % space.port):
                    with self.subTest(to, status=status):
                        space.faults.add("redirect", to=to, status=status)
                        cso.fetch(task, session)
                        self.assertRight(space, ORBITS[0])
                        os.unlink(task.path)
            self.assertEqual((self.waits, space.logins, space.count("value")), ([], 1, 30))

    def test_a_redirect_to_another_host_goes_without_the_token(self):
        with DataSpace(ORBITS) as space, DataSpace(ORBITS) as other, names_on_loopback(
                {"files.example.eu": other}):
            other.tokens.refusal = lambda header: None
            space.faults.add("redirect", to="http://files.example.eu{target}")
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertRight(space, ORBITS[0])
            self.assertEqual([headers.get("Authorization") for _, headers in self.asked(other)],
                             [None])
            self.assertIn("Authorization", self.asked(space)[0][1])

    def test_redirects_and_urls_that_lead_nowhere(self):
        for to in ("{target}", "file:///etc/hosts", "ftp://127.0.0.1/x", "http://", "//[/"):
            with self.subTest(to), DataSpace(ORBITS) as space:
                space.faults.add("redirect", to=to, times=None)
                with self.assertRaises(cso.HttpError):
                    cso.fetch(self.known(space, ORBITS[0]), self.session(space))
                self.assertLessEqual(space.count("value"), 7)
                self.assertEqual((self.files(), self.waits), ([], []))
        for href in ("file:///etc/hosts", "ftp://127.0.0.1/x", "http:///x", "x", "http://[/x"):
            with self.subTest(href), self.assertRaises(cso.DataSpaceError):
                cso.fetch(cso.Task(href, self.path("x.nc")), cso.Session(
                    environ=ENVIRON, sleep=self.waits.append))
            self.assertEqual((self.files(), self.waits), ([], []))

    def test_a_form_follows_no_redirect(self):
        """The password is in it."""
        with DataSpace(ORBITS) as space, DataSpace(ORBITS) as other:
            for status in (301, 302, 303, 307, 308):
                space.faults.add("redirect", "token", to=other.token_url, status=status)
                with self.subTest(status), self.assertRaises(cso.DataSpaceError):
                    self.session(space).token.get()
            self.assertEqual(other.requests, [])

    def test_no_proxy_sees_what_stays_on_this_machine(self):
        with DataSpace(ORBITS) as space, Proxy({}) as proxy:
            os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = "http://127.0.0.1:%d" % proxy.port
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertRight(space, ORBITS[0])
            self.assertEqual(proxy.requests, [])

    def test_what_of_an_error_body_is_said(self):
        for body, expected in (
                ('{"detail": {"code": "DAT-111", "message": "Bad\\n id"}}', "Bad id: DAT-111"),
                ("<head>x</head><p>Not <b>here</b>", "Not here"),
                ("GET / Authorization: Bearer T0.K-en Host", "GET / Authorization: Bearer ... Host"),
                ('{"message": "for password=s3cret&x=y"}', "for password=...&x=y"), ("", "")):
            with self.subTest(body):
                self.assertEqual(cso.service_message(body.encode()), expected)
        for depth in (400, 900, 2000):          # more than may be decoded, or read
            cso.service_message(b"[" * depth + b"]" * depth)

    def test_a_stop_ends_the_wait_for_a_slot(self):
        session = cso.Session(connections=1)
        with session.slots:
            waiting = threading.Thread(target=self.assertRaises, daemon=True,
                                       args=(cso.DataSpaceError, session.slots.__enter__))
            waiting.start()
            session.stop()
            waiting.join(5)
            self.assertFalse(waiting.is_alive())

    def test_a_slash_in_the_password_of_a_proxy(self):
        """Older Pythons take what is before it for host and port."""
        os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = "http://me:s3cret/word@127.0.0.1:9"
        with self.assertRaises(cso.HttpError) as caught:
            cso.Http().open("http://files.example.eu/x")
        self.assertNotIn("s3cret", str(caught.exception))


class TokenTest(DownloadCase):
    """Credentials, one token for all, its renewal, its cache; and no secret anywhere."""

    def fetch_all(self, space, session, records=ORBITS):
        for record in records:
            cso.fetch(self.known(space, record), session)

    # -- credentials

    def user_of(self, environ, host="127.0.0.1"):
        """The user whom the token endpoint meets."""
        with DataSpace(ORBITS) as space:
            with contextlib.suppress(cso.LoginError):
                cso.Session(token_url=space.token_url, environ=environ).token.get(host)
            return dict(urllib.parse.parse_qsl(space.requests[-1][3].decode())).get("username")

    def netrc(self, text, mode=0o600):
        path = self.write("netrc", text)
        os.chmod(path, mode)
        return path

    def test_order_of_credentials(self):
        hosts = ["127.0.0.1", "zipper.dataspace.copernicus.eu", "download.dataspace.copernicus.eu",
                 "identity.dataspace.copernicus.eu", "dataspace.copernicus.eu"]
        lines = ["machine %s login user%d password p%d\n" % (host, k, k)
                 for k, host in enumerate(hosts)]
        path = self.netrc("".join(reversed(lines)))
        self.assertEqual(self.user_of({"NETRC": path, "CDSE_USERNAME": "first",
                                       "CDSE_PASSWORD": "p"}), "first")
        half = cso.Session(environ={"NETRC": path, "CDSE_USERNAME": "first"})
        self.assertRaisesRegex(cso.LoginError, "only one of CDSE_USERNAME and", half.token.get)
        for k in range(len(hosts)):
            with self.subTest(hosts[k]):
                path = self.netrc("machine example.eu login x password y\n" + "".join(lines[k:]))
                self.assertEqual(self.user_of({"NETRC": path}), "user%d" % k)
        os.rename(self.netrc("machine dataspace.copernicus.eu login home password p\n"),
                  self.path(".netrc"))
        self.assertEqual(self.user_of({}), "home")

    @unittest.skipIf(os.name == "nt", "there are no modes")
    def test_netrc_that_others_can_read(self):
        line = "machine dataspace.copernicus.eu login me password s3cret\n"
        for mode, refused in ((0o600, False), (0o400, False), (0o640, True), (0o604, True)):
            with self.subTest("%o" % mode):
                environ = {"NETRC": self.netrc(line, mode)}
                session = cso.Session(environ=environ, token_url="http://127.0.0.1:9/token",
                                      retry=cso.Retry(1))
                with self.assertRaises(cso.LoginError if refused else cso.HttpError) as caught:
                    session.token.get()
                self.assertEqual("chmod" in str(caught.exception), refused)
                os.unlink(environ["NETRC"])

    def test_no_credentials(self):
        path = self.netrc("machine example.eu login x password y\n")
        for environ in ({}, {"NETRC": path}, {"NETRC": self.path("missing")}):
            with self.subTest(environ), DataSpace(ORBITS) as space:
                with self.assertRaises(cso.LoginError) as caught:
                    cso.fetch(self.known(space, ORBITS[0]), self.session(space, environ=environ))
                for place in ("CDSE_USERNAME", "CDSE_PASSWORD", environ.get("NETRC", ".netrc"),
                              "127.0.0.1", "zipper.", "download.", "identity."):
                    self.assertIn(place, str(caught.exception))
                self.assertEqual(space.count("value"), 0)

    def test_a_netrc_that_is_none_is_refused_without_its_words(self):
        for text in ("machine x login me passwd s3cret\n", "s3cret\n",
                     "machine x login \"s3cret\n"):
            with self.subTest(text), self.assertRaises(cso.LoginError) as caught:
                cso.Session(environ={"NETRC": self.netrc(text)}).token.get()
            self.assertNotIn("s3cret", str(caught.exception))

    def test_codes_of_rfc_6238(self):
        secret = base64.b32encode(b"12345678901234567890").decode()
        for now, code in ((59, "287082"), (1111111109, "081804"), (1111111111, "050471"),
                          (1234567890, "005924"), (2000000000, "279037"), (20000000000, "353130")):
            with self.subTest(now):
                self.assertEqual(cso.totp(secret, now), code)
        for spelt in ("gezd gnbv gy3t qojq gezd gnbv gy3t qojq",
                      "GEZDGNBV-GY3TQOJQ-GEZDGNBV-GY3TQOJQ"):
            self.assertEqual(cso.totp(spelt, 59), "287082")
        self.assertRegex(cso.totp("GEZDGNBVGY", 59), r"^\d{6}$")     # unpadded

    def test_two_factors(self):
        secret = "GEZDGNBVGY3TQOJQ"
        for environ, code, missing in (
                ({"CDSE_TOTP": "123456"}, "123456", None), ({}, "123456", "CDSE_TOTP"),
                ({"CDSE_TOTP_SECRET": "1890"}, "123456", "CDSE_TOTP_SECRET"),
                ({"CDSE_TOTP_SECRET": secret}, lambda: cso.totp(secret, time.time()), None)):
            with self.afresh(environ), DataSpace(ORBITS, totp=code) as space:
                session = self.session(space, environ=dict(ENVIRON, **environ))
                if missing:
                    self.assertRaisesRegex(cso.LoginError, missing, session.token.get)
                else:
                    self.fetch_all(space, session)
                    self.assertRight(space, *ORBITS)

    # -- one token

    def test_one_login_for_all_threads_and_one_logout(self):
        records = list(made_products(12))
        with DataSpace(records) as space:
            with self.session(space) as session:
                tasks = [self.known(space, record) for record in records]
                states = [outcome.state for outcome in cso.download(tasks, session)]
            self.assertEqual(states, ["verified"] * 12)
            self.assertRight(space, *records)
            self.assertEqual((space.count("token"), space.count("value"), space.count("product"),
                              space.logouts), (1, 12, 0, 1))

    def test_size_and_md5_are_asked_once_a_file(self):
        with stand_in("fin at=100, 503, html") as space:
            tasks = [self.task(space, record) for record in ORBITS]
            list(cso.download(tasks, self.session(space)))
            self.assertRight(space, *ORBITS)
            self.assertEqual(space.count("product"), 3)
            paths = [path for path, _ in self.asked(space, kind=")")]
            self.assertEqual(len(set(paths)), 3)

    def test_renewed_before_it_ends(self):
        for expires, seconds, refused, counts in (
                (600, 500, False, (1, 0)), (600, 560, False, (1, 1)), (600, 9000, False, (1, 1)),
                (600, 9000, True, (2, 0)), (30, 25, False, (1, 1)), (30, 5, False, (1, 0))):
            with self.afresh((expires, seconds)):
                now = [1000.0]
                with DataSpace(ORBITS, expires_in=expires, refresh_expires_in=20000,
                               clock=lambda: now[0]) as space:
                    session = self.session(space, clock=lambda: now[0])
                    self.fetch_all(space, session, ORBITS[:1])
                    now[0] += seconds
                    if refused:
                        space.revoke_tokens(refresh=True)
                    self.fetch_all(space, session, ORBITS[1:])
                    self.assertRight(space, *ORBITS)
                    self.assertEqual((space.logins, space.refreshes), counts)
                    self.assertEqual(space.count("value"), 3)       # none of them a 401

    def test_the_clock_on_the_wall_may_jump(self):
        for hours in (-30, -1, 1, 30):
            with self.afresh(hours), DataSpace(ORBITS) as space:
                session = self.session(space)
                self.fetch_all(space, session, ORBITS[:1])
                with mock.patch.object(time, "time", lambda: 1700000000 + 3600 * hours):
                    self.fetch_all(space, session, ORBITS[1:])
                self.assertEqual((space.count("token"), space.count("value")), (1, 3))

    def test_401(self):
        for after, revoke in ((0, False), (3, False), (3, True)):
            with self.afresh(after, revoke=revoke), DataSpace(list(made_products(6))) as space:
                session = self.session(space)
                if not after:
                    switch_on(space, "401")
                self.fetch_all(space, session, space.records[:after])
                if after:
                    space.revoke_tokens(refresh=revoke)
                self.fetch_all(space, session, space.records[after:])
                self.assertRight(space, *space.records)
                self.assertEqual((space.count("value"), self.waits), (7, []))
                self.assertEqual((space.logins, space.refreshes), (2, 0) if revoke else (1, 1))

    def test_threads_that_meet_a_401_renew_once(self):
        records = list(made_products(9))
        with DataSpace(records, latency=0.01) as space:
            session = self.session(space)
            self.fetch_all(space, session, records[:1])
            space.revoke_tokens()
            list(cso.download([self.known(space, record) for record in records[1:]], session))
            self.assertRight(space, *records)
            self.assertEqual((space.logins, space.refreshes), (1, 1))

    def test_401_for_ever(self):
        with stand_in("401 times=None", list(made_products(9))) as space:
            with self.assertRaises(cso.LoginError):
                list(cso.download([self.known(space, record) for record in space.records],
                                  self.session(space, connections=1)))
            self.assertLessEqual(space.count("value"), 3)
            self.assertLessEqual(space.count("token"), 2)
            self.assertEqual((self.files(), self.waits), ([], []))

    def test_tokens_refused_now_and_then_are_no_refused_login(self):
        with DataSpace(ORBITS) as space:
            session = self.session(space)
            for record in ORBITS:
                self.fetch_all(space, session, [record])
                space.revoke_tokens()
            self.assertRight(space, *ORBITS)
            self.assertEqual((space.logins, space.refreshes), (1, 2))

    def test_two_threads_may_reject_one_token(self):
        with DataSpace(ORBITS) as space:
            session = self.session(space)
            token = session.token.get()
            for _ in range(2):
                session.token.reject(token, "401")
            self.assertNotEqual(session.token.get(), token)

    def test_a_401_of_a_host_that_was_shown_no_token_is_no_refused_login(self):
        with DataSpace(ORBITS) as space, DataSpace(ORBITS) as other, names_on_loopback(
                {"files.example.eu": other}):
            space.faults.add("redirect", to="http://files.example.eu{target}", times=None)
            session = self.session(space)
            for record in ORBITS:
                with self.assertRaises(cso.HttpError):
                    cso.fetch(self.known(space, record), session)
            self.assertEqual((space.count("token"), other.count("value")), (1, 3))

    # -- a token endpoint in trouble

    def test_a_refresh_that_ends_in_500_is_followed_by_a_login(self):
        with DataSpace(ORBITS) as space:
            session = self.session(space)
            self.fetch_all(space, session, ORBITS[:1])
            space.revoke_tokens()
            switch_on(space, "500 on=token")
            self.fetch_all(space, session, ORBITS[1:])
            self.assertEqual((space.logins, self.waits), (2, []))

    def test_token_endpoint_in_passing_trouble(self):
        for text, waits in (("429 on=token retry_after=33", 1), ("503 on=token times=3", 3),
                            ("429 on=token", 1), ("500 on=token", 1), ("503 on=token", 1),
                            ("html on=token", 1), ("empty on=token", 1),
                            ("cut on=token", 1), ("drop on=token", 1), ("rst on=token", 1),
                            ("fin on=token at=5", 1), ("stall-headers on=token", 1)):
            with self.afresh(text), stand_in(text) as space:
                self.fetch_all(space, self.session(space, timeout=0.2, retry=cso.Retry(5, 1, 9)))
                self.assertRight(space, *ORBITS)
                self.assertEqual((len(self.waits), space.count("value")), (waits, 3))
                self.assertEqual(33 <= self.waits[0] <= 1.25 * 33, "33" in text, self.waits)

    def test_a_token_endpoint_down_for_ever_is_asked_so_many_times(self):
        with stand_in("503 on=token times=None") as space:
            session = self.session(space, retry=cso.Retry(4, 1, 9))
            with self.assertRaises(cso.HttpError) as caught:
                cso.fetch(self.known(space, ORBITS[0]), session)
            self.assertEqual(caught.exception.status, 503)
            self.assertEqual((space.count("token"), space.count("value")), (4, 0))

    def test_a_refused_login_says_why_and_ends_the_batch(self):
        for faults in ("", "400 on=token text=Invalid-user-credentials times=None"):
            with self.subTest(faults), stand_in(faults, users={"user": "other"}) as space:
                session = self.session(space)
                tasks = [self.known(space, record) for record in ORBITS]
                for attempt in (lambda: cso.fetch(tasks[0], session),
                                lambda: cso.fetch(tasks[1], session),
                                lambda: list(cso.download(tasks, session))):
                    with self.assertRaises(cso.LoginError) as caught:
                        attempt()
                self.assertRegex(str(caught.exception), "CDSE_USERNAME.*Invalid.user.credentials")
                self.assertEqual((space.count("token"), space.count("value"), self.waits),
                                 (1, 0, []))

    def test_no_password_over_http(self):
        session = cso.Session(token_url="http://identity.example.eu/token", environ=ENVIRON)
        with names_on_loopback({}), self.assertRaisesRegex(cso.LoginError, "http"):
            session.token.get()

    # -- the cache

    def cached(self, space, **options):
        environ = dict(ENVIRON, CDSE_TOKEN_CACHE=self.path("token"))
        return self.session(space, environ=environ, **options)

    def test_the_cache_serves_one_session_after_another(self):
        with DataSpace(ORBITS) as space:
            for record in ORBITS:
                with self.cached(space) as session:
                    self.fetch_all(space, session, [record])
            self.assertRight(space, *ORBITS)
            self.assertEqual((space.count("token"), space.count("logout")), (1, 0))
            self.assertEqual(self.files(), sorted([r.name for r in ORBITS] + ["token"]))
            if os.name == "posix":
                self.assertEqual(os.stat(self.path("token")).st_mode & 0o777, 0o600)

    def test_two_sessions_on_one_cache_renew_once(self):
        with DataSpace(list(made_products(6))) as space:
            sessions = self.cached(space), self.cached(space)
            for session, record in zip(sessions, space.records):
                self.fetch_all(space, session, [record])
            space.revoke_tokens()
            for session, record in zip(sessions, space.records[2:]):
                self.fetch_all(space, session, [record])
            self.assertRight(space, *space.records[:4])
            self.assertEqual((space.logins, space.refreshes), (1, 1))

    def test_the_login_of_another_process_is_waited_for(self):
        """Its claim lies there until it has a token, or is as old as one of a dead process."""
        for other_logs_in, age in ((True, 0), (False, 0), (False, 3600)):
            with self.afresh((other_logs_in, age)), DataSpace(ORBITS) as space:
                claim, other = self.write("token.login", ""), self.cached(space)
                os.utime(claim, (time.time() - age,) * 2)

                def meanwhile(seconds):
                    self.assertTrue(os.path.exists(claim))
                    if age == 0:
                        os.unlink(claim)
                    if other_logs_in:
                        other.token.get()
                self.cached(space, sleep=meanwhile).token.get()
                self.assertEqual((space.logins, self.files()), (1, ["token"]))

    def test_a_cache_that_does_not_serve(self):
        """A token that was revoked meanwhile, or what is none, is replaced by another."""
        def left_claim(space):
            os.unlink(self.path("token"))
            os.utime(self.write("token.login", ""), (1, 1))
        for name, spoil in (
                ("garbage", lambda space: self.write("token", "{")),
                ("emptied", lambda space: self.write("token", "")),
                ("revoked", lambda space: space.revoke_tokens(refresh=True)),
                ("refreshable", DataSpace.revoke_tokens), ("left claim", left_claim)):
            with self.afresh(name), DataSpace(ORBITS) as space:
                self.fetch_all(space, self.cached(space), ORBITS[:1])
                spoil(space)
                if os.path.exists(self.path("token")):
                    os.chmod(self.path("token"), 0o600)
                self.fetch_all(space, self.cached(space), ORBITS[1:])
                self.assertRight(space, *ORBITS)
                self.assertEqual(space.logins + space.refreshes, 2)

    def test_the_cache_of_another_account_is_not_used(self):
        with DataSpace(ORBITS, users={"user": "password", "other": "password"}) as space:
            self.fetch_all(space, self.cached(space), ORBITS[:1])
            environ = dict(ENVIRON, CDSE_USERNAME="other", CDSE_TOKEN_CACHE=self.path("token"))
            self.fetch_all(space, self.session(space, environ=environ), ORBITS[1:])
            self.assertEqual(space.logins, 2)

    def test_a_cache_from_another_time_is_not_used(self):
        for hours, tokens in ((-5, 2), (5, 2), (0.003, 1)):     # seconds are no other time
            with self.afresh(hours), DataSpace(ORBITS) as space:
                first, second = self.cached(space), self.cached(space)
                first.token.now = lambda: time.time() + 3600 * hours
                self.fetch_all(space, first, ORBITS[:1])
                self.fetch_all(space, second, ORBITS[1:])
                self.assertRight(space, *ORBITS)
                self.assertEqual(
                    (space.logins + space.refreshes, space.count("value")), (tokens, 3))

    def test_a_cache_that_can_not_be(self):
        """Others can read it; or there is no such folder."""
        with DataSpace(ORBITS) as space:
            if os.name != "nt":                         # where there are no modes
                os.chmod(self.write("token", ""), 0o644)
                with self.assertRaisesRegex(cso.LoginError, "chmod"):
                    self.cached(space).token.get()
            environ = dict(ENVIRON, CDSE_TOKEN_CACHE=self.path("missing", "token"))
            with self.assertRaises(cso.DataSpaceError):
                self.session(space, environ=environ).token.get()

    # -- pickling, secrets

    def test_pickled_sessions_have_no_token(self):
        with DataSpace(ORBITS) as space:
            self.account(space)
            session = self.session(space, sleep=None, trusted=["zipper.creodias.eu"],
                                   connections=2)
            downloader = cso.CSO_DataSpace_Downloader()
            downloader.CreateToken(space.href(ORBITS[0]))
            self.fetch_all(space, session, ORBITS[:1])
            for owner in (session, downloader):
                data = pickle.dumps(owner)
                for secret in list(space.tokens.access) + list(space.tokens.renewal) + ["password"]:
                    self.assertNotIn(secret.encode(), data)
            copy = pickle.loads(pickle.dumps(session))
            self.assertEqual((copy.connections, copy.trusted), (2, ("zipper.creodias.eu",)))
            self.fetch_all(space, copy, ORBITS[1:2])
            pickle.loads(pickle.dumps(downloader)).DownloadFile(
                space.href(ORBITS[2]), self.path(ORBITS[2].name))
            self.assertRight(space, *ORBITS)
            self.assertEqual(space.logins, 4)

    def test_errors_can_be_pickled(self):
        with stand_in("404") as space:
            with self.assertRaises(cso.HttpError) as caught:
                cso.fetch(self.known(space, ORBITS[0]), self.session(space))
        copy = pickle.loads(pickle.dumps(caught.exception))
        self.assertEqual((str(copy), copy.status), (str(caught.exception), 404))

    def test_no_secret_is_shown(self):
        """Neither printed, logged, raised, pickled, written nor put in a url."""
        password, secret = "pass/W0rd %&;", "GEZDGNBVGY3TQOJQ"
        seen = []
        for users, faults in (
                ({"user": password}, ""), ({"user": password}, "503, fin at=100, html, 404"),
                ({"user": "another"}, ""), ({"user": password}, "401 times=None"),
                ({"user": password}, "redirect to=http://files.example.eu{target} times=None"),
                ({"user": password}, "redirect to={target} times=None"),
                ({"user": password}, "400 on=token"),
                ({"user": password}, "html on=token times=2")):
            with DataSpace(ORBITS, users=users) as space, DataSpace(ORBITS) as other, \
                    names_on_loopback({"files.example.eu": other}):
                self.new_folder()
                self.account(space, CDSE_PASSWORD=password, CDSE_TOTP_SECRET=secret)
                with mock.patch.object(cso.Retry, "wait", lambda *args: 0):
                    switch_on(space, faults)
                    seen += self.run_main("download", "-v", self.table(space, ORBITS), "--dir",
                                          self.path("data"), "--report", self.path("report.csv"))
                    switch_on(space, faults)
                    session = cso.Session()
                    try:
                        self.fetch_all(space, session)
                    except cso.DataSpaceError as error:
                        seen += [str(error), repr(error), pickle.dumps(error), repr(vars(error)),
                                 repr(error.__cause__), repr(error.__context__)]
                    seen += [pickle.dumps(session), repr(session), repr(session.token.credentials),
                             repr(session.token.grant)]
                for host in (space, other):
                    seen += [target for _, target, _, _ in host.requests]
                seen += [repr((headers, body)) for _, _, headers, body in other.requests]
                for name in self.files():       # a part may go: a thread that stops discards it
                    with contextlib.suppress(FileNotFoundError):
                        seen.append(self.read(name))
                tokens = list(space.tokens.access) + list(space.tokens.renewal)
                words = tokens + [password, urllib.parse.quote_plus(password), secret,
                                  urllib.parse.quote(password)]
                text = "\n".join(item.decode("latin-1") if isinstance(item, bytes) else str(item)
                                 for item in seen)
                self.assertEqual([word for word in words if word in text], [], faults)
                self.assertIn("S5P_OFFL", text)

    def test_null_auth(self):
        self.assertEqual(cso.NullAuth()("request"), "request")
        try:
            import requests
        except ImportError:
            self.skipTest("requests is not installed")
        os.environ["NETRC"] = self.netrc("machine 127.0.0.1 login me password p\n")
        with DataSpace(ORBITS) as space:
            for auth, kind in ((None, "Basic"), (cso.NullAuth(), "Bearer")):
                requests.get(space.href(ORBITS[0]), auth=auth, timeout=5,
                             headers={"Authorization": "Bearer x"}).close()
                self.assertEqual(space.requests[-1][2]["Authorization"].split()[0], kind)


# How a file ends, after so many requests for its bytes, where these meet the faults in turn.  Size
# and MD5 are known, four tries are allowed.
FAULTS_OF_A_FILE = list(ends_of_faults("""
verified after 1: chunked-ok | no-length | zip | zip-of-paths
verified after 2: drop | chunked | chunked at=0 | cut at=10000 | flip at=0 | flip at=19999 |
    html | json | empty | 504 | stall-headers | stall-body at=0 | stall-body at=10000 |
    fin at=8000, ignore-range | broken-zip | uninvited-206 | trickle every=0.02
verified after 3: cut at=10000, cut at=19999 | fin at=8000, fin at=8000 |
    fin at=8000, wrong-range | fin at=8000, wrong-range by=-100 | fin at=8000, headless-206 |
    fin at=8000, lying-range | fin at=8000, 416 | fin at=8000, html | fin at=8000, json |
    fin at=8000, empty | fin at=8000, flip at=100 | fin at=8000, cut at=100 |
    fin at=8000, chunked at=100 | fin at=8000, redirect to={target} | fin at=8000, 401 |
    fin at=3, ignore-range, fin at=8000 | flip at=7000, fin at=8000 |
    fin at=8000, 416 times=None
verified after 4: drop, drop, rst at=0 | 408, 500, 502 | 503 times=3 | 429 times=3 |
    fin at=8000, rst at=0, drop | fin at=8000, 503, 429
failed after 1: two-files times=None | 400 times=None | 403 times=None | 404 times=None
failed after 3: changed | flip at=50 times=None | cut at=50 times=None | broken-zip times=None
failed after 4: 503 times=None | html times=None | fin at=0 times=None | fin at=100 times=None
"""))

# The same where the catalogue knows no MD5: nobody can see a flipped byte then.
FAULTS_WITHOUT_MD5 = list(ends_of_faults("""
size only after 1: zip
size only after 2: drop | fin at=8000 | fin at=8000, ignore-range | fin at=8000, changed |
    fin at=8000, changed, fin at=9000 | cut at=100 | chunked at=100 | html | json | empty
size only after 3: fin at=8000, wrong-range | fin at=8000, headless-206 | fin at=8000, 416 |
    fin at=8000, html | fin at=8000, blind-206
failed after 4: html times=None
"""))

# And where it knows no size either: nobody can see then that a body was cut with its length.
FAULTS_WITHOUT_SIZE = list(ends_of_faults("""
unverified after 1: zip
unverified after 2: drop | fin at=8000 | fin at=8000, ignore-range | fin at=8000, changed |
    chunked at=100 | uninvited-206 | html | json | empty
unverified after 3: fin at=8000, wrong-range | fin at=8000, wrong-range by=-100 |
    fin at=8000, headless-206 | fin at=8000, 416 | fin at=8000, html
failed after 1: no-length
failed after 3: empty times=None
"""))


class DownloadTest(DownloadCase):
    """A file is complete and checked, or absent and reported."""

    def one_of_three(self, space, faults, **options):
        """The outcome of the middle one of three files; the others must be right."""
        self.new_folder()
        space.faults.clear()
        target = space.records[1]
        for words in faults.split(", "):
            switch_on(space, "%s name=%s" % (words, target.id))
        options.setdefault("retry", cso.Retry(4, 1, 9))
        session = self.session(space, timeout=0.15, **options)
        tasks = [self.task(space, record) for record in space.records]
        outcomes = {outcome.filename: outcome for outcome in cso.download(tasks, session)}
        self.assertRight(space, space.records[0], space.records[2])
        outcome = outcomes[target.name]
        if outcome.state == "failed":
            self.assertFalse(os.path.exists(self.path(target.name)))
            self.assertTrue(outcome.message)
        else:
            self.assertRight(space, target)
            self.assertNothingElse(*space.records)
        return outcome

    def test_faults(self):
        for fields, rows in (({}, FAULTS_OF_A_FILE), ({"checksum": ""}, FAULTS_WITHOUT_MD5),
                             ({"checksum": "", "stated": 0}, FAULTS_WITHOUT_SIZE)):
            with DataSpace(made_products(3, **fields)) as space:
                for faults, state, requests in rows:
                    with self.subTest(faults, **fields):
                        del space.requests[:]
                        outcome = self.one_of_three(space, faults)
                        asked = len(self.asked(space, space.records[1]))
                        self.assertEqual((outcome.state, asked), (state, requests),
                                         outcome.message)

    def test_connections_that_end_at_any_byte(self):
        with DataSpace(ORBITS) as space:
            for kind in ("fin", "rst"):
                for at in (0, 1, 7, 8, 9, 64, 9999, 19999):
                    with self.subTest(kind, at=at):
                        outcome = self.one_of_three(space, "%s at=%d" % (kind, at))
                        self.assertEqual(outcome.state, "verified")

    def test_a_broken_transfer_goes_on_where_it_stopped(self):
        """And a page in its place leaves the bytes that are there."""
        for faults in ("fin at=8000", "fin at=8000, html", "fin at=8000, json"):
            with self.afresh(faults), stand_in(faults) as space:
                outcome = cso.fetch(self.known(space, ORBITS[0]), self.session(space))
                self.assertEqual(outcome.bytes, 20000)
                first, *others = [headers for _, headers in self.asked(space, ORBITS[0])]
                self.assertNotIn("Range", first)
                self.assertEqual({headers["Range"] for headers in others}, {"bytes=8000-"})
                self.assertEqual((len(others), all("If-Range" in headers for headers in others)),
                                 (1 + faults.count(","), True))

    def test_bytes_go_on_only_where_old_and_new_are_known_to_belong_together(self):
        for etag, checksum, asked, condition in (
                ('"%s-%d"', "", True, True), ('W/"%s-%d"', "", False, False), (None, "", False, False),
                ('W/"%s-%d"', "MD5", True, False), (None, "MD5", True, False)):
            with self.afresh((etag, checksum)), DataSpace(
                    made_products(1, checksum=checksum), etag=etag) as space:
                switch_on(space, "fin at=8000")
                cso.fetch(self.task(space, space.records[0]), self.session(space))
                self.assertRight(space, space.records[0])
                headers = self.asked(space, space.records[0])[-1][1]
                self.assertEqual(("Range" in headers, "If-Range" in headers), (asked, condition))

    def test_what_is_unknown_of_a_file(self):
        zeros = "0" * 32
        for stated, checksum, state in (
                (None, "MD5", "verified"), (0, "MD5", "verified"), (-1, "MD5", "verified"),
                (None, "", "size only"), (None, "N/A", "size only"), (None, zeros, "size only"),
                (0, "", "unverified"), (-1, "N/A", "unverified"), (0, zeros, "unverified")):
            with self.afresh((stated, checksum)), DataSpace(
                    made_products(1, stated=stated, checksum=checksum)) as space:
                switch_on(space, "fin at=9000")
                task = self.task(space, space.records[0])
                outcome, = cso.download([task], self.session(space))
                self.assertEqual(outcome.state, state)
                self.assertRight(space, space.records[0])

    def test_what_the_table_says_is_not_asked(self):
        with DataSpace(ORBITS) as space:
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertEqual(space.count("product"), 0)
            wrong = self.known(space, ORBITS[1])._replace(md5="1" * 32)
            with self.assertRaisesRegex(cso.CheckError, "MD5"):
                cso.fetch(wrong, self.session(space))
            short = self.known(space, ORBITS[2])._replace(size=19999)
            with self.assertRaisesRegex(cso.CheckError, "19999"):
                cso.fetch(short, self.session(space))
            self.assertNothingElse(ORBITS[0])

    def test_a_catalogue_that_refuses_the_question_is_no_obstacle(self):
        with DataSpace(ORBITS) as space:
            for record, status in zip(ORBITS, ("400", "404")):
                switch_on(space, "%s on=product" % status)
                outcome = cso.fetch(self.task(space, record), self.session(space))
                self.assertEqual((outcome.state, self.waits), ("unverified", []))

    def test_a_file_that_is_there_is_not_fetched_again(self):
        """But one without a byte is not there."""
        for fields, state in (({}, "verified"), ({"stated": 0, "checksum": ""}, "unverified")):
            with self.afresh(fields), DataSpace(made_products(1, **fields)) as space:
                record, = space.records
                self.write(record.name, "")
                for expected in (state, "present", "present"):
                    outcome = cso.fetch(self.task(space, record), self.session(space))
                    self.assertEqual(outcome.state, expected)
                self.assertOnly(space, record)
                self.assertEqual(space.count("value"), 1)

    def test_a_file_of_another_size_is_replaced_when_the_right_one_is_there(self):
        with DataSpace(ORBITS) as space:
            self.write(ORBITS[0].name, "short")
            switch_on(space, "404")
            with self.assertRaises(cso.HttpError):
                cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertEqual(self.read(ORBITS[0].name), b"short")
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertRight(space, ORBITS[0])

    def test_a_failed_file_is_gone_on_with_in_the_next_run(self):
        with stand_in("fin at=8000, 404") as space:
            for state in ("failed", "verified"):
                outcome, = cso.download([self.known(space, ORBITS[0])], self.session(space))
                self.assertEqual(outcome.state, state)
            self.assertOnly(space, ORBITS[0])
            self.assertEqual([headers.get("Range") for _, headers in self.asked(space)],
                             [None, "bytes=8000-", "bytes=8000-"])

    def test_an_object_that_changed_between_two_runs_is_not_mixed(self):
        for fields in ({}, {"checksum": ""}):
            with self.afresh(fields), DataSpace(made_products(1, **fields)) as space:
                record, = space.records
                switch_on(space, "fin at=8000, 404")
                outcome, = cso.download([self.task(space, record)], self.session(space))
                self.assertEqual(outcome.state, "failed")
                space.change(record.id)
                cso.fetch(self.task(space, record), self.session(space))
                self.assertOnly(space, record)

    # -- zips

    def test_zips_of_which_nothing_is_known(self):
        """One file is unpacked, two are refused at once."""
        records = list(made_products(3, stated=0, checksum=""))
        with stand_in("zip, zip-of-paths, two-files", records) as space:
            for record in records[:2]:
                cso.fetch(self.task(space, record), self.session(space))
            with self.assertRaisesRegex(cso.CheckError, "2 .nc files"):
                cso.fetch(self.task(space, records[2]), self.session(space))
            self.assertOnly(space, *records[:2])
            self.assertEqual(self.waits, [])

    def test_directory_products_stay_zips(self):
        record = next(record for record in RECORDS if record.name.endswith(".SAFE"))
        with stand_in("broken-zip, flipped-zip, zip", [record]) as space:
            table = self.write("table.csv", "filename;href\n%s;%s\n" % (record.name,
                                                                         space.href(record)))
            task, = cso.tasks_of(cso.read_table(table), self.folder)
            self.assertEqual(task.path, self.path(record.name + ".zip"))
            outcome = cso.fetch(task, self.session(space))
            self.assertEqual((outcome.state, space.count("value")), ("verified", 3))
            with zipfile.ZipFile(task.path) as archive:
                self.assertIsNone(archive.testzip())
            self.assertEqual(cso.fetch(task, self.session(space)).state, "present")

    # -- the disk

    def disk(self, space_left=10 ** 9, full=errno.ENOSPC, begun=()):
        """An open() that finds the disk full after so many bytes, buffered as files are; `begun`
        are the errors that parts meet in turn as they are begun."""
        begun = list(begun)

        class Disk(io.FileIO):
            def write(self, data):
                nonlocal space_left
                if space_left < len(data):
                    raise OSError(full, os.strerror(full))
                space_left -= len(data)
                return io.FileIO.write(self, data)

        def fake(path, mode="r", *args, **kwargs):
            if mode != "xb" or isinstance(path, int):
                return open(path, mode, *args, **kwargs)
            error = begun.pop(0) if begun else None
            if error:
                raise OSError(error, os.strerror(error))
            return io.BufferedWriter(Disk(path, "w"))
        return mock.patch.object(cso, "open", fake, create=True)

    def test_a_part_that_cannot_be_begun_again_is_an_error_of_its_own(self):
        with stand_in("fin at=8000, ignore-range") as space, self.disk(begun=[None, errno.EIO]), \
                self.assertRaisesRegex(cso.FileError, os.strerror(errno.EIO)):
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))

    def test_a_full_disk_ends_the_batch(self):
        for number in (errno.ENOSPC, errno.EDQUOT):
            with self.afresh(errno.errorcode[number]), DataSpace(
                    list(made_products(9)), content_size=100000) as space:
                tasks = [self.known(space, record) for record in space.records]
                with self.disk(250000, number), \
                        self.assertRaises(cso.FileError) as caught:
                    list(cso.download(tasks, self.session(space, connections=1)))
                self.assertTrue(caught.exception.fatal)
                self.assertRight(space, *space.records[:2])
                self.assertLessEqual(space.count("value"), 4)
                self.assertEqual(self.waits, [])
                for outcome in cso.download(tasks, self.session(space)):
                    self.assertIn(outcome.state, ("verified", "present"))
                self.assertOnly(space, *space.records)

    def test_a_disk_known_to_be_too_small_is_not_begun_with(self):
        usage = shutil.disk_usage(self.folder)._replace(free=50000)
        with DataSpace(ORBITS) as space:
            tasks = [self.known(space, record) for record in ORBITS]
            with mock.patch.object(shutil, "disk_usage", lambda path: usage), \
                    self.assertRaises(cso.FileError) as caught:
                list(cso.download(tasks, self.session(space)))
            self.assertTrue(caught.exception.fatal)
            self.assertEqual((space.requests, self.files()), ([], []))
            self.write(ORBITS[0].name, "x" * 20000)
            with mock.patch.object(shutil, "disk_usage", lambda path: usage):
                list(cso.download(tasks, self.session(space)))

    def test_where_no_file_can_be(self):
        self.write("file", "")
        with DataSpace(ORBITS) as space:
            for name in (os.path.join("file", "x.nc"), "x" * 300 + ".nc"):
                with self.subTest(name):
                    tasks = [self.known(space, ORBITS[0])._replace(path=self.path(name)),
                             self.known(space, ORBITS[1])]
                    states = {outcome.filename: outcome.state
                              for outcome in cso.download(tasks, self.session(space))}
                    self.assertEqual(states, {os.path.basename(name): "failed",
                                              ORBITS[1].name: "verified"})
                    self.assertRight(space, ORBITS[1])
                    os.unlink(self.path(ORBITS[1].name))
                    self.assertEqual(self.files(), ["file"])

    # -- MD5 where it is forbidden

    def test_pythons_whose_md5_is_forbidden_or_takes_no_keyword(self):
        def forbidden(*data, **options):
            raise ValueError("disabled for FIPS")
        for md5, state in ((forbidden, "size only"), (lambda *data: MD5(*data), "verified")):
            with DataSpace(ORBITS) as space, mock.patch.object(hashlib, "md5", md5):
                self.new_folder()
                switch_on(space, "fin at=9000, cut at=100")
                self.assertEqual([cso.fetch(self.task(space, record), self.session(space)).state
                                  for record in ORBITS], [state] * 3)
                self.assertRight(space, *ORBITS)

    # -- others at the same file

    def put(self, space, record):
        """Let another process bring the file."""
        with open(self.path(record.name), "wb") as out:
            out.write(space.body(record))

    def part_left(self, space, record, owner=None):
        """Leave the part of a broken transfer, under the name of this or of another process."""
        switch_on(space, "fin at=8000, 404")
        with self.assertRaises(cso.HttpError):
            cso.fetch(self.known(space, record), self.session(space))
        part, = [name for name in self.files() if name.endswith(".part")]
        if owner is not None:
            other = re.sub(r"\.nc\..*-\d+-(\d+)\.part$", r".nc.%s-\1.part" % owner, part)
            self.assertNotEqual(part, other)
            os.rename(self.path(part), self.path(other))
            part = other
        return self.path(part)

    def test_a_file_that_another_process_fetches_is_waited_for(self):
        with DataSpace(ORBITS) as space:
            part = self.part_left(space, ORBITS[0], owner="elsewhere-1")

            def other_goes_on(seconds):
                self.put(space, ORBITS[0])
                os.unlink(part)
            outcome = cso.fetch(self.known(space, ORBITS[0]),
                                self.session(space, sleep=other_goes_on))
            self.assertEqual((outcome.state, space.count("value")), ("present", 2))
            self.assertNothingElse(ORBITS[0])

    def test_the_longest_part_that_nobody_writes_to_is_taken_over(self):
        with DataSpace(ORBITS) as space:
            part = self.part_left(space, ORBITS[0], owner="elsewhere-1")
            for number in ("0", "2"):
                with open(re.sub(r"elsewhere-1-", "elsewhere-%s-" % number, part), "wb") as out:
                    out.write(self.read(part)[:3000])
            for name in self.files():
                os.utime(self.path(name), (1, 1))
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertOnly(space, ORBITS[0])
            self.assertEqual(self.asked(space)[-1][1].get("Range"), "bytes=8000-")

    def test_a_file_that_came_just_before_the_claim_is_not_fetched(self):
        listdir = os.listdir
        with DataSpace(ORBITS) as space:
            def late(folder):           # so a claim looks for the parts of others
                self.put(space, ORBITS[0])
                return listdir(folder)
            with mock.patch.object(os, "listdir", late):
                outcome = cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertEqual((outcome.state, space.count("value")), ("present", 0))
            self.assertNothingElse(ORBITS[0])

    def test_a_spoilt_part_does_no_harm(self):
        """And a whole one needs no further request."""
        with DataSpace(ORBITS) as space:
            for left, requests in ((b"", 1), (b"x" * 8000, 2), (b"x" * 20000, 1),
                                   (b"x" * 30000, 1), (space.body(ORBITS[0]), 0)):
                with self.afresh(left[:2], length=len(left)):
                    with open(self.part_left(space, ORBITS[0]), "wb") as out:
                        out.write(left)
                    before = space.count("value")
                    cso.fetch(self.known(space, ORBITS[0]), self.session(space))
                    self.assertOnly(space, ORBITS[0])
                    self.assertEqual(space.count("value") - before, requests)
        with self.afresh("no MD5"), DataSpace(made_products(1, checksum="")) as space:
            record, = space.records         # nobody can tell what was left of it
            with open(self.part_left(space, record), "wb") as out:
                out.write(HDF5.ljust(20000, b"x"))
            cso.fetch(self.task(space, record), self.session(space))
            self.assertOnly(space, record)

    def test_two_threads_at_one_target(self):
        with DataSpace(ORBITS, latency=0.02) as space:
            outcomes = list(cso.download([self.known(space, ORBITS[0])] * 4, self.session(
                space, sleep=lambda seconds: time.sleep(min(seconds, 0.01)))))
            self.assertEqual(sorted(outcome.state for outcome in outcomes),
                             ["present"] * 3 + ["verified"])
            self.assertOnly(space, ORBITS[0])
            self.assertEqual(space.count("value"), 1)

    # -- how many at once

    def test_at_most_so_many_transfers(self):
        records = list(made_products(10))
        for connections in (1, 2, 4):
            with self.afresh(connections), stand_in(
                    "leisurely times=None", records, max_transfers=None) as space:
                tasks = [self.known(space, record) for record in records]
                list(cso.download(tasks, self.session(space, connections=connections)))
                self.assertRight(space, *records)
                self.assertEqual(space.peak_transfers, connections)
                self.assertEqual((space.count("value"), space.count("token")), (10, 1))

    def test_threads_of_others_share_the_transfers_of_a_session(self):
        with stand_in("leisurely times=None", max_transfers=None) as space:
            session = self.session(space, connections=1)
            threads = [threading.Thread(target=cso.fetch, args=(self.known(space, record), session))
                       for record in ORBITS]
            for step in (threading.Thread.start, threading.Thread.join):
                for thread in threads:
                    step(thread)
            self.assertRight(space, *ORBITS)
            self.assertEqual(space.peak_transfers, 1)

    def test_429_lowers_the_number_of_connections(self):
        slots = cso.Slots(4, None)
        for limit, left in ((4, 3), (4, 3), (3, 2), (2, 1), (1, 1)):    # once for each number
            slots.shrink(limit)
            self.assertEqual(slots.limit, left)
        records = list(made_products(12))
        for faults, delay, most in (("leisurely times=None", 0, 12 + 3), ("", 0.02, 99)):
            with self.afresh(faults), DataSpace(
                    records, max_transfers=2, release_delay=delay) as space:
                switch_on(space, faults)
                session = self.session(space, retry=cso.Retry(50, 1, 9),
                                       sleep=lambda seconds: space.closing.wait(0.005))
                list(cso.download([self.known(space, record) for record in records], session))
                self.assertRight(space, *records)
                self.assertTrue(12 < space.count("value") <= most, space.count("value"))

    # -- the original names

    def test_downloader(self):
        with DataSpace(ORBITS) as space:
            self.account(space)
            downloader = cso.CSO_DataSpace_Downloader()
            downloader.CreateToken(space.href(ORBITS[0]))
            self.assertEqual((space.logins, space.count("value")), (1, 0))
            for record in ORBITS:
                downloader.DownloadFile(space.href(record), self.path("new", record.name),
                                        indent="  ")
            self.assertEqual((space.count("token"), space.count("value")), (1, 3))
            self.assertEqual(self.files(), ["new/" + record.name for record in ORBITS])

    def test_downloader_keeps_its_number_of_tries(self):
        for on, text in (("value", "503"), ("token", "503"), ("product", "503"),
                         ("token", "rst at=0")):
            with self.afresh(text, on=on), stand_in(
                    "%s on=%s times=None" % (text, on)) as space:
                self.account(space)
                with mock.patch.object(threading.Event, "wait",
                                       lambda event, seconds=None: self.waits.append(seconds)):
                    with self.assertRaises(cso.DataSpaceError):
                        cso.CSO_DataSpace_Downloader().DownloadFile(
                            space.href(ORBITS[0]), self.path("x.nc"), 3, 2, 3)
                self.assertEqual(space.count(on), 3)
                waits = [seconds for seconds in self.waits if seconds and seconds >= 1]
                self.assertEqual(waits, [2, 3])

    @unittest.skipIf(os.name == "nt", "there are no modes")
    def test_modes_of_new_directories(self):
        self.addCleanup(os.umask, os.umask(0o077))
        with DataSpace(ORBITS) as space:
            self.account(space)
            downloader = cso.CSO_DataSpace_Downloader()
            for k, (dmode, expected) in enumerate((
                    (0o775, 0o775), (0o2775, 0o2775), (777, 0o777), (755, 0o755), ("777", 0o777),
                    ("0o775", 0o775), ("2775", 0o2775), (None, 0o700))):
                with self.subTest(dmode):
                    folder = self.path("old%d" % k)
                    os.mkdir(folder)
                    downloader.DownloadFile(space.href(ORBITS[0]), os.path.join(
                        folder, "a", "b", "x.nc"), dmode=dmode)
                    for path in ("a", "a/b"):
                        mode = os.stat(os.path.join(folder, path)).st_mode & 0o7777
                        self.assertEqual("%o" % mode, "%o" % expected)
                    self.assertEqual(os.stat(folder).st_mode & 0o777, 0o700)
            for dmode in ("rwx", "999", -1):
                with self.subTest(dmode), self.assertRaises(cso.DataSpaceError):
                    downloader.DownloadFile(space.href(ORBITS[0]), self.path("z", "x.nc"),
                                            dmode=dmode)


def run_program(case, *args, env={}, **options):
    """Start the program as a user does; returns the process, which ends with the test."""
    if os.name != "nt":         # Ctrl-C is ignored where the tests run in the background of a shell
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "cso_dataspace"] + list(args),
        env=dict(os.environ, PYTHONPATH=HERE, **env), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **options)

    def end():
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    case.addCleanup(end)
    return process


@unittest.skipIf(os.name == "nt", "signals are another matter there")
class BatchTest(DownloadCase):
    """The program as it is run: tables, processes side by side, signals, report, exit status."""

    def start(self, space, *args, **environ):
        """A process of the program with the account of the stand-in."""
        return run_program(self, *args, cwd=self.folder, env=dict(
            ENVIRON, CDSE_TOKEN_URL=space.token_url, **environ))

    def finish(self, process):
        """Exit status and stderr of a process; long before a time-out of 60 s."""
        _, err = process.communicate(timeout=30)
        return process.returncode, err

    def sent(self, count):
        """Wait until a part holds so many bytes."""
        def happened():
            with contextlib.suppress(FileNotFoundError):        # it was renamed just now
                return any(os.path.getsize(self.path(name)) >= count for name in self.files()
                           if name.endswith(".part"))
        wait_until(happened)

    def download(self, space, table, *args):
        self.account(space)
        return self.run_main("download", table, "--dir", self.path("data"), *args)

    # -- tables

    def test_old_tables(self):
        record = ORBITS[0]
        with DataSpace(ORBITS) as space:
            href = space.href(record)
            for text in ("filename;href\n{name};{quoted}\n",
                         'filename;href\n{name};"{doubly}"\n',
                         "mine;filename;href;size;yours\n1;{name};{href};20000;2\n",
                         "md5;filename;href\n{md5};{name};{href}\n"):
                with self.afresh(text):
                    table = self.write("t.csv", text.format(
                        name=record.name, href=href, md5=space.md5(record).upper(),
                        quoted=href.replace("(", "('").replace(")", "')"),
                        doubly=href.replace("(", '(""').replace(")", '"")')))
                    status, _, err = self.download(space, table)
                    self.assertEqual(status, 0, err)
                    self.assertEqual(self.read("data", record.name), space.body(record))

    # -- report and exit status

    def test_report_and_status(self):
        with DataSpace(ORBITS) as space:
            table = self.table(space, ORBITS)
            report = self.path("report.csv")
            space.faults.add("404", name=ORBITS[1].id, text="Gone for ever")
            for expected, states, came in (
                    (3, ["verified", "failed", "verified"], ["20000", "0", "20000"]),
                    (0, ["present", "verified", "present"], ["0", "20000", "0"])):
                status, out, err = self.download(space, table, "--report", report)
                self.assertEqual(status, expected)
                with open(report, encoding="utf-8", newline="") as text:
                    rows = sorted(csv.DictReader(text, delimiter=";"),
                                  key=lambda row: row["filename"])
                self.assertEqual(list(rows[0]),
                                 ["filename", "state", "bytes", "seconds", "message"])
                self.assertEqual([row["filename"] for row in rows], [r.name for r in ORBITS])
                self.assertEqual([row["state"] for row in rows], states)
                self.assertEqual([row["bytes"] for row in rows], came)
                self.assertEqual("Gone for ever" in rows[1]["message"], expected == 3)
                for text in ("Gone for ever", "1 files failed; run the same command again to"):
                    self.assertEqual(text in err, expected == 3)
                self.assertNotIn("Traceback", err)

    def test_parts_of_a_table(self):
        records = list(made_products(7))
        with DataSpace(records) as space:
            table, seen = self.table(space, records), []
            for part in ("1/3", "2/3", "3/3", "0/3"):               # the last is the same as 3/3
                self.assertEqual(self.download(space, table, "--part", part)[0], 0)
                seen.append(space.count("value"))
            self.assertEqual(seen, [2, 4, 7, 7])
            self.assertEqual(self.files(), sorted(
                ["table.csv"] + ["data/" + record.name for record in records]))

    # -- processes side by side

    def test_eight_processes_on_one_table(self):
        records = list(made_products(10))
        with DataSpace(records, latency=0.005, max_transfers=None) as space:
            rows = ["%s;%s" % (record.name, space.href(record)) for record in records]
            table = self.write("table.csv", "\n".join(["filename;href"] + rows) + "\n")
            jobs = [self.start(space, "download", table, "--dir", "data", "--report", "r%d" % k,
                               CDSE_TOKEN_CACHE=self.path("token")) for k in range(8)]
            ended = [self.finish(job) for job in jobs]
            self.assertEqual([status for status, _ in ended], [0] * 8, ended)
            for record in records:
                self.assertEqual(self.read("data", record.name), space.body(record))
            self.assertEqual(self.files(), sorted(["table.csv", "token"] + [
                "data/" + record.name for record in records] + ["r%d" % k for k in range(8)]))
            asked = collections.Counter(path for path, _ in self.asked(space))
            self.assertEqual(set(asked.values()), {1})
            self.assertEqual((len(asked), space.logins, space.refreshes), (10, 1, 0))
            self.assertLessEqual(space.count("product"), 8 * 10)
            self.assertEqual(sum(self.read("r%d" % k).count(b";verified;") for k in range(8)), 10)

    def test_stopped_and_run_again(self):
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
            with self.afresh(expected), DataSpace(ORBITS, content_size=300000) as space:
                command = ["download", self.table(space, ORBITS), "--report", "report.csv"]
                switch_on(space, "stall-body at=200000 name=%s" % ORBITS[1].id)
                job = self.start(space, *command)
                wait_until(lambda: all(os.path.exists(self.path(ORBITS[k].name)) for k in (0, 2)))
                self.sent(100000)
                job.send_signal(number)
                status, err = self.finish(job)
                self.assertEqual((status, "Traceback" in err), (expected, False), err)
                self.assertRight(space, ORBITS[0], ORBITS[2])
                self.assertFalse(os.path.exists(self.path(ORBITS[1].name)))
                if expected > 0:
                    self.assertIn("run again", err)
                    self.assertIn(ORBITS[1].name.encode() + b";failed;", self.read("report.csv"))
                left = max(os.path.getsize(self.path(name)) for name in self.files()
                           if name.endswith(".part"))
                status, err = self.finish(self.start(space, *command))
                self.assertEqual(status, 0, err)
                self.assertRight(space, *ORBITS)
                self.assertEqual(self.files(), sorted(
                    [record.name for record in ORBITS] + ["report.csv", "table.csv"]))
                self.assertEqual(self.asked(space)[-1][1].get("Range"), "bytes=%d-" % left)

    def test_stopped_while_it_waits(self):
        for faults in ("stall-headers times=None", "stall-headers on=token",
                       "429 on=token times=None retry_after=60"):
            with self.afresh(faults), stand_in(faults) as space:
                table = self.write("table.csv", "filename;href\n%s;%s\n" % (
                    ORBITS[0].name, space.href(ORBITS[0])))
                job = self.start(space, "download", table)
                wait_until(lambda: any(switched.taken for switched in space.faults.on))
                job.send_signal(signal.SIGTERM)
                status, err = self.finish(job)
                self.assertEqual((status, "Traceback" in err), (143, False), err)
                self.assertFalse(os.path.exists(self.path(ORBITS[0].name)))


class MishapTest(DownloadCase):
    """What others do to a run costs at most the file it happens to."""

    def test_a_part_taken_from_its_living_owner_is_begun_again(self):
        with DataSpace(ORBITS) as space:
            def take(count):
                for name in self.files():
                    if name.endswith(".part") and not taken:
                        taken.append(os.unlink(self.path(name)))
            taken = []
            task = self.known(space, ORBITS[0])
            outcome, = cso.download([task], self.session(space), on_bytes=take)
            self.assertEqual((outcome.state, taken), ("verified", [None]))

    def test_the_age_of_a_part_is_told_by_the_clock_of_the_disk(self):
        other = cso.Part(self.path("x.nc"))
        mine = cso.Part(other.target)
        for part in (other, mine):
            part.leave()
            with open(part.path, "wb"):
                os.utime(part.path, (10 ** 9, 10 ** 9))     # a disk whose clock is years behind
        elsewhere = "%s.elsewhere-1-5.part" % other.target
        os.rename(other.path, elsewhere)
        with open(mine.path, "rb") as mine.file:
            task = cso.Task("", other.target)
            self.assertFalse(cso.claim(mine, task))
            os.utime(elsewhere, (10 ** 9 - 121, 10 ** 9 - 121))
            self.assertTrue(cso.claim(mine, task))

    def test_an_error_of_the_system_is_of_one_file_only(self):
        look = os.listdir
        with DataSpace(ORBITS) as space:
            def refuse(path):
                if path.endswith("1"):
                    raise PermissionError(errno.EACCES, "refused")
                return look(path)
            tasks = [self.known(space, record)._replace(path=self.path(str(number), record.name))
                     for number, record in enumerate(ORBITS)]
            with mock.patch.object(os, "listdir", refuse):
                states = sorted(one.state for one in cso.download(tasks, self.session(space)))
            self.assertEqual(states, ["failed", "verified", "verified"])

    def test_a_part_of_no_possible_process(self):
        with DataSpace(ORBITS) as space:
            host = cso.owner_name().rpartition("-")[0]
            self.write("%s.%s-%d-1.part" % (ORBITS[0].name, host, 10 ** 30), "x")
            cso.fetch(self.known(space, ORBITS[0]), self.session(space))
            self.assertNothingElse(ORBITS[0])

    def test_a_zip_of_a_file_of_another_size_is_not_unpacked(self):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.nc", bytes(10 ** 6))
        part = cso.Part(self.path("x.nc"))
        part.write(packed.getvalue())
        with mock.patch.object(shutil, "copyfileobj") as copy, \
                self.assertRaisesRegex(cso.CheckError, "0 .nc files of 1000 bytes"):
            cso.verify(cso.Task("", part.target, 1000), part)
        part.leave()
        self.assertEqual(copy.mock_calls, [])

    def test_what_a_service_says_does_not_steer_the_terminal(self):
        with DataSpace(ORBITS) as space:
            self.account(space)
            space.faults.add("404", text="gone \x1b[2J")
            status, _, err = self.run_main("download", space.href(ORBITS[0]), "--report",
                                           self.path("report.csv"))
            self.assertEqual((status, "gone \\x1b[2J" in err, "\x1b" in err), (3, True, False))
            self.assertIn(b"gone \\x1b[2J", self.read("report.csv"))

    def test_a_report_that_fails_as_well_does_not_hide_what_ended_the_run(self):
        with DataSpace(ORBITS) as space:
            tasks = [self.known(space, record) for record in ORBITS]
            reports = mock.Mock(side_effect=[None, cso.FileError("full")])
            with mock.patch.object(cso, "write_report", reports), \
                    mock.patch.object(cso, "check_space", mock.Mock(side_effect=SystemExit(143))), \
                    self.assertRaises(SystemExit):
                cso.fetch_all(tasks, self.session(space), "report", cso.Screen(io.StringIO()))

    @unittest.skipIf(os.name == "nt", "signals are another matter there")
    def test_a_signal_waits_for_no_service(self):
        with DataSpace(one_day()) as space:
            for on in ("odata", "logout"):
                space.faults.add("stall-headers", on=on, times=None)
            process = run_program(self, "run", RC, "--env", "my.work=" + self.folder,
                                  *at(space.url), env=ENVIRON)
            wait_until(lambda: any(switched.taken for switched in space.faults.on))
            began = time.monotonic()
            for _ in range(3):                              # as launchers of jobs do
                process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
            self.assertEqual((process.returncode, "Traceback" in err), (143, False), err)
            self.assertLess(time.monotonic() - began, 5)

    @unittest.skipUnless(hasattr(os, "openpty"), "no pseudo-terminals here")
    def test_a_terminal_and_a_reader_that_have_left(self):
        rc = self.write("x.rc", "a : 1\n")
        environ = dict(os.environ, PYTHONPATH=HERE, PYTHONUNBUFFERED="")
        for args, expected in (("settings nosuch.rc", 1), ("--help", 0), ("settings " + rc, 1)):
            with self.subTest(args):
                ends = os.openpty() + os.pipe()
                os.close(ends[0])
                os.close(ends[2])
                command = [sys.executable, "-m", "cso_dataspace"] + args.split()
                status = subprocess.call(command, env=environ, cwd=self.folder, stderr=ends[1],
                                         stdout=ends[3])
                os.close(ends[1])
                os.close(ends[3])
                self.assertEqual(status, expected)


class TlsTest(DownloadCase):
    """The real names and https, with an authority made for the test; proxies."""

    NAMES = NAMES + ["files.example.eu"]

    @classmethod
    def setUpClass(cls):
        cls.keys = tempfile.TemporaryDirectory()
        cls.authority, cls.tls = certificate(cls.keys.name, cls.NAMES)

    @classmethod
    def tearDownClass(cls):
        cls.keys.cleanup()

    def setUp(self):
        DownloadCase.setUp(self)
        os.environ["SSL_CERT_FILE"] = self.authority
        os.environ.pop("SSL_CERT_DIR", None)
        self.space = self.use(DataSpace(ORBITS, tls=self.tls))

    def real(self, record, host="download"):
        return "https://%s.dataspace.copernicus.eu/odata/v1/Products(%s)/$value" % (host, record.id)

    def fetch(self, href, record=ORBITS[0], **options):
        """Fetch with the account and the urls that are the default."""
        options.setdefault("sleep", self.waits.append)
        session = cso.Session(environ=ENVIRON, timeout=5, **options)
        return cso.fetch(cso.Task(href, self.path(record.name)), session)

    def all_names(self, *more):
        return names_on_loopback(dict(dict.fromkeys(self.NAMES, self.space), **dict(more)))

    def hosts(self, space=None):
        """(host, whether a token came) of the requests for bytes."""
        return [(headers["Host"], "Authorization" in headers)
                for _, headers in self.asked(space or self.space)]

    def test_hrefs_of_all_ages(self):
        record = ORBITS[0]
        zipper = self.real(record, "zipper")
        for href in (self.real(record), zipper, zipper.replace("(", "('").replace(")", "')"),
                     zipper.replace("(", '("').replace(")", '")'), " %s\n" % zipper,
                     zipper.replace("https", "http"),
                     self.real(record).replace("https", "http"), "s3:/" + s3_path(record)):
            with self.afresh(href), self.all_names():
                self.assertEqual(self.fetch(href).state, "verified")
                self.assertRight(self.space, record)
                self.assertEqual(self.hosts()[-1], ("download.dataspace.copernicus.eu", True))

    def test_an_s3_href_of_an_unknown_name(self):
        with self.all_names(), self.assertRaisesRegex(cso.CatalogueError, "no product"):
            self.fetch("s3://eodata/x/S5P_none.nc")

    def test_an_unknown_authority_is_refused(self):
        other, _ = certificate(self.use(tempfile.TemporaryDirectory()), self.NAMES)
        for path in (other, self.path("missing.pem")):
            with self.subTest(path), self.all_names():
                os.environ["SSL_CERT_FILE"], os.environ["SSL_CERT_DIR"] = path, self.folder
                with mock.patch.object(cso, "CA_BUNDLES", ()), \
                        self.assertRaises(cso.HttpError) as caught:
                    self.fetch(self.real(ORBITS[0]))
                self.assertIn("SSL_CERT_FILE", str(caught.exception))
                self.assertEqual((self.space.requests, self.waits), ([], []))

    def test_a_certificate_for_another_name_is_refused(self):
        with names_on_loopback({"wrong.dataspace.copernicus.eu": self.space,
                                "catalogue.dataspace.copernicus.eu": self.space}):
            with self.assertRaises(cso.HttpError):
                self.fetch(self.real(ORBITS[0], "wrong"))
            self.assertEqual(self.asked(self.space), [])

    def test_a_python_without_authorities_takes_those_of_the_system(self):
        os.environ.update(SSL_CERT_FILE=self.path("missing.pem"), SSL_CERT_DIR=self.path("missing"))
        with self.all_names(), mock.patch.object(cso, "CA_BUNDLES", (
                self.path("none.pem"), self.authority)):
            self.fetch(self.real(ORBITS[0]))
        self.assertRight(self.space, ORBITS[0])

    def test_redirects(self):
        name = "%s.dataspace.copernicus.eu"
        for to, trusted, met in (
                ("{target}", (), (name % "download", True)),
                ("https://%s{target}" % name % "zipper", (), (name % "zipper", True)),
                ("//%s{target}" % name % "zipper", (), (name % "zipper", True)),
                ("https://files.example.eu{target}", (), ("files.example.eu", False)),
                ("https://files.example.eu{target}", NAMES + ["files.example.eu"],
                 ("files.example.eu", True)),
                ("https://files.example.eu{target}", ["x.example.eu"], ("files.example.eu", False)),
                ("http://%s{target}" % name % "plain", (), (name % "plain", False)),
                ("http://files.plain.eu{target}", ["files.plain.eu"], ("files.plain.eu", False))):
            with self.afresh(to, trusted=trusted), DataSpace(ORBITS) as plain, self.all_names(
                    (name % "plain", plain), ("files.plain.eu", plain)):
                self.use_no_tokens(plain, met[1])
                self.space.faults.add("redirect", to=to)
                self.fetch(self.real(ORBITS[0]), trusted=trusted)
                self.assertRight(self.space, ORBITS[0])
                self.assertEqual((self.hosts() + self.hosts(plain))[-1], met)
                self.assertNotIn("Authorization", repr(self.hosts(plain)))

    def use_no_tokens(self, plain, strict):
        """Let the stand-ins give files to anybody, unless they shall insist on a token."""
        plain.tokens.refusal = lambda header: None
        self.space.tokens.__dict__.pop("refusal", None)
        if not strict:
            self.space.tokens.refusal = lambda header: None

    def test_proxies(self):
        names = dict.fromkeys(self.NAMES, self.space)
        for password, given, no_proxy, state in (
                (None, "", "", "proxy"), ("me:secret", "me:secret@", "", "proxy"),
                ("me:s%cret", "me:s%25cret@", "", "proxy"),
                (None, "", ".copernicus.eu", "direct"), (None, "", "*", "direct"),
                (None, "", "example.eu", "proxy"),
                ("me:secret", "", "", "407"), ("me:secret", "me:wrong@", "", "407")):
            with self.afresh((password, given, no_proxy)), Proxy(names, password) as proxy:
                os.environ.update(HTTPS_PROXY="http://%s127.0.0.1:%d" % (given, proxy.port),
                                  NO_PROXY=no_proxy)
                with self.all_names() if state == "direct" else contextlib.ExitStack():
                    if state == "407":
                        with self.assertRaises(cso.HttpError) as caught:
                            self.fetch(self.real(ORBITS[0]))
                        self.assertIn("password", str(caught.exception))
                        self.assertNotIn("wrong", str(caught.exception))
                        self.assertEqual(self.waits, [])
                        continue
                    self.fetch(self.real(ORBITS[0]))
                self.assertRight(self.space, ORBITS[0])
                self.assertEqual(proxy.connections, 3 if state == "proxy" else 0)
                self.assertNotIn("Bearer", repr(proxy.requests))

    def test_a_proxy_that_is_not_there(self):
        os.environ["HTTPS_PROXY"] = "http://127.0.0.1:9"
        with self.assertRaises(cso.HttpError):
            self.fetch(self.real(ORBITS[0]), retry=cso.Retry(3, 1, 2))
        self.assertEqual(len(self.waits), 2)


URLS = ("url={0}/odata/v1", "download_url={0}/odata/v1/Products({{product_id}})/$value",
        "token_url={0}" + AUTH + "token")


def at(url, *settings):
    """The arguments that turn example.rc to a stand-in, with further settings."""
    return [word for one in URLS + settings for word in ("--set", one.format(url))]


def readme(kind):
    """The code blocks of the README of a kind: "" for indented commands, "python", "sh"."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as text:
        text = text.read().replace("\\\n", " ")
    if kind:
        return re.findall(r"(?ms)^```%s\n(.*?)^```" % kind, text)
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return [textwrap.dedent(block) for block in re.findall(r"(?m)(?:^    .*\n)+", text)]


class MainTest(Case):
    """The command line, as a user meets it."""

    def setUp(self):
        Case.setUp(self)
        os.environ.update(ENVIRON)
        self.space = self.use(DataSpace(one_day()))
        self.common = at(self.space.url) + ["--env", "my.work=" + self.folder]

    def names(self, ending):
        return [name for name in self.files() if name.endswith(ending)]

    def test_run_writes_the_table_and_the_checked_files(self):
        status, out, err = self.run_main("run", RC, *self.common)
        self.assertEqual((status, out), (0, "8 of 8 files here: 8 verified\n"), err)
        rows = cso.read_table(self.path(self.names(".csv")[0]))
        self.assertEqual(sorted(row.filename for row in rows),
                         sorted(map(os.path.basename, self.names(".nc"))))
        for name in self.names(".nc"):
            record = next(one for one in self.space.records if one.name == os.path.basename(name))
            self.assertEqual(self.read(name), self.space.body(record))
            self.assertTrue(name.startswith(os.path.join("OFFL", "2018", "07", "01")), name)
        self.assertEqual((self.space.count("value"), self.space.logins, self.space.logouts),
                         (8, 1, 1))
        again = self.run_main("run", RC, *self.common)
        self.assertEqual(again[:2], (0, "8 of 8 files here: 8 present\n"))
        self.assertEqual((self.space.count("value"), self.space.logins), (8, 2))

    def test_a_wrong_password_is_told_before_anything_is_written(self):
        os.environ["CDSE_TOKEN_URL"] = self.space.token_url
        table = self.write("t.csv", "filename;href;size;md5\na.nc;%s;9;%s\n" % (
            self.space.href(self.space.records[0]), "a" * 32))
        for environ, said in (
                ({"CDSE_PASSWORD": "wrong"}, "Invalid user credentials"),
                ({"CDSE_PASSWORD": "", "CDSE_USERNAME": ""}, "none found; looked at")):
            for args in (["run", RC] + self.common,
                         ["download", table, "--dir", self.path("data")]):
                with self.subTest(environ, args=args), mock.patch.dict(os.environ, environ):
                    status, out, err = self.run_main(*args)
                    self.assertEqual((status, out, err.count("\n")), (1, "", 1))
                    self.assertIn(said, err)
                    self.assertEqual(self.names(".csv") + self.names(".nc"), ["t.csv"])
        self.assertEqual(self.space.count("odata"), 0)

    def test_dry_run_shows_requests_files_and_bytes_and_does_nothing(self):
        status, out, err = self.run_main("run", RC, "--dry-run", *self.common)
        self.assertEqual(status, 0, err)
        self.assertIn("request: %s/Products?$filter=Collection/Name eq" % self.space.odata, out)
        self.assertIn("8 files, 160.0 kB\n", out)
        status, out, err = self.run_main("run", RC, "--dry-run", "--part", "0/3", *self.common)
        self.assertEqual((status, out.count(" <- ")), (0, 3), err)
        table = self.write("t.csv", "filename;href;size\na.nc;http://127.0.0.1/x;2500\n")
        status, out, err = self.run_main("download", table, "--dry-run", "--dir", "data")
        self.assertEqual((status, out), (0, "1 files, 2.5 kB\n%s <- http://127.0.0.1/x\n"
                                         % os.path.join("data", "a.nc")), err)
        self.assertEqual((self.files(), self.space.count("value"), self.space.logins),
                         (["t.csv"], 0, 0))

    def test_download_of_a_table_or_a_href(self):
        self.run_main("inquire", RC, *self.common)
        table, = self.names(".csv")
        os.environ["CDSE_TOKEN_URL"] = self.space.token_url
        status, out, err = self.run_main("download", self.path(table), "--dir", self.path("%d"))
        self.assertEqual((status, len(self.names(".nc"))), (0, 8), err)
        record = self.space.records[0]
        status, out, err = self.run_main("download", self.space.href(record), "--dir",
                                         self.path("one"))
        self.assertEqual((status, self.read("one", record.name)),
                         (0, self.space.body(record)), err)

    def test_batch_log_has_a_line_per_file_and_quiet_only_errors(self):
        status, out, err = self.run_main("run", RC, *self.common)
        done = re.findall(r"(?m)^S5P_\S+\.nc: verified, 20.0 kB in [\d.]+ s, [\d.]+ \w+/s$", err)
        self.assertEqual(len(done), 8, err)
        self.assertNotIn("\r", err)
        self.assertEqual(self.run_main("run", RC, "-q", *self.common)[2], "")

    def test_mistakes_end_with_one_line_and_status(self):
        missing = self.path("none.rc")
        several = self.write("two.rc", "a.timerange.start : 2018\nb.timerange.start : 2019\n")
        href = self.space.href(self.space.records[0])
        good = self.write("good.csv", "filename;href\na.nc;%s\n" % href)
        broken = self.write("table.csv", "filename;href\na.nc;%s\nx.nc\n" % href)
        for args, status, said in (
                (["run", missing], 1, "error: %s: settings can't be read; tried" % missing),
                (["run", several], 1, "choose one: --rcbase a or b"),
                (["run", RC, "--part", "3"], 2, "argument --part: '3' is not I/N"),
                (["run", RC, "--set", "area=1,2,3"], 1, "area: '1,2,3' is no area"),
                (["run", RC, "--set", "download.dir=%{orbits}"], 1, "no column orbits"),
                (["run", RC, "--set", "timerange.end=2001-01-01"], 1, "is before timerange.start"),
                (["run", RC, "--set", "dmode=abc"], 1, "--set dmode: dmode: 'abc' is no mode"),
                (["download", broken], 1, "table.csv:3: 1 fields; the header has 2"),
                (["download", "nosuch.csv"], 1, "nosuch.csv: can't be read"),
                (["download", self.folder], 1, self.folder + ": can't be read"),
                (["download"], 2, "TABLE"),
                (["download", self.space.odata + "/Products(x)/$value"], 1, "no product for this href"),
                (["download", "https://[/x"], 1, "error"), (["download", "http:///x"], 1, "error"),
                (["download", good, "--nonsense"], 2, "--nonsense"),
                (["download", good, "--dir", "%{orbits}"], 1, "'%{orbits}' has no column orbits"),
                (["download", good, "--part", "1/0"], 2, "'1/0' is not I/N"),
                (["download", good, "--connections", "0", "--dry-run"], 2, "--connections"),
                (["settings", missing], 1, missing),
                (["run"], 2, "RCFILE"), (["dowload"], 2, "invalid choice"), ([], 2, "COMMAND"),
                (["run", RC, "--set", "x"], 2, "'x' is not NAME=VALUE"),
                (["--version"], 0, "cso_dataspace %s" % cso.__version__)):
            with self.subTest(args=args):
                got, out, err = self.run_main(*(args + self.common * (RC in args)))
                self.assertEqual(got, status, err)
                self.assertIn(said, out + err)
                self.assertNotIn("Traceback", err)
                if status == 1:
                    self.assertEqual(err.count("error: "), 1, err)
        self.assertEqual((self.names(".nc"), self.space.count("token")), ([], 0))

    def test_misspelt_setting_is_pointed_out(self):
        _, _, err = self.run_main("run", RC, *(self.common + [
            "--set", "cso.s5p.no2.area.minmum=3"]))
        self.assertEqual(err.count("cso.s5p.no2.area.minmum is no setting of this program and is "
                                   "ignored; is area.minimum meant?"), 1)
        self.assertEqual(self.run_main("inquire", "-q", RC, *(self.common + [
            "--set", "cso.s5p.no2.area.minmum=3"]))[2], "")

    def test_a_program_that_calls_main_stays_as_it_was(self):
        def state():
            return (list(cso.log.handlers), cso.log.level, cso.log.propagate,
                    signal.getsignal(signal.SIGTERM))
        before = state()
        for args in (["settings", RC, "-v"] + self.common, ["settings", "nosuch.rc", "-q"]):
            self.run_main(*args)
            self.assertEqual(state(), before)

    def test_help_fits_a_screen_and_shows_an_example(self):
        for command in cso.COMMANDS:
            with self.subTest(command=command):
                status, out, _ = self.run_main(command, "--help")
                self.assertEqual(status, 0)
                self.assertIn("example: cso_dataspace " + command, out)
                self.assertLessEqual(out.count("\n"), 30)

    def test_check_tells_what_to_do(self):
        status, out, err = self.run_main("check", RC, *self.common)
        self.assertEqual((status, out.count(" ok: "), out.count("\n")), (0, 7, 7), out + err)
        self.assertIn("opensearch   ok: %s answers" % self.space.opensearch, out)
        with mock.patch.object(os, "access", lambda *args: False):
            status, out, _ = self.run_main("check", RC, *self.common)
        self.assertEqual((status, out.count("NOT ok")), (1, 1), out)
        self.assertIn("choose another download.dir", out)
        del os.environ["CDSE_PASSWORD"], os.environ["CDSE_USERNAME"]
        status, out, err = self.run_main("check", RC, *self.common)
        self.assertEqual((status, out.count("NOT ok")), (1, 2), out)
        self.assertIn("machine zipper.dataspace.copernicus.eu login USER", out)

    def test_console_without_utf8(self):
        rc = self.write("x.rc", "grid : 1 \u00d7 1\n")
        process = run_program(self, "settings", rc, env={"PYTHONIOENCODING": "ascii"})
        out, err = process.communicate(timeout=30)
        self.assertEqual((process.returncode, out), (0, "grid : 1 \\xd7 1   ! %s:1\n" % rc), err)

    def test_reader_that_leaves_early(self):
        rc = self.write("long.rc", "".join("k%d : %s\n" % (n, "x" * 99) for n in range(5000)))
        process = run_program(self, "settings", rc)
        process.stdout.readline()
        process.stdout.close()
        self.assertEqual((process.stderr.read(), process.wait(30)), ("", 1))


class ScreenTest(Case):
    """The line of progress."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def screen(self, width):
        """A stream, its Screen, the Progress of two files of 1 GB, and the time in a list."""
        now, stream = [0.0], self.Terminal()
        screen = cso.Screen(stream, clock=lambda: now[0])
        screen.width = lambda: width
        tasks = [cso.Task("", "a", 10 ** 9), cso.Task("", "b", 10 ** 9)]
        return stream, screen, cso.Progress(tasks, screen, clock=lambda: now[0]), now

    def test_one_line_cut_to_the_window_ten_times_a_second(self):
        stream, screen, progress, now = self.screen(40)
        for step in range(100):
            now[0] = step / 100.0
            progress.add(10 ** 6)
            progress.draw()
        shown = [text for text in stream.getvalue().split("\r") if text.strip()]
        self.assertLessEqual(len(shown), 11)
        self.assertTrue(all(len(text) < 40 for text in shown), shown)
        self.assertNotIn("\n", stream.getvalue())
        screen.write("a message\n")
        self.assertTrue(stream.getvalue().endswith("\r" + " " * len(shown[-1]) + "\ra message\n"))
        self.assertEqual(shown[-1], "0/2 files, 97.0 MB of 2.0 GB, 101.0 MB/s, 18 s left"[:39])

    def test_files_that_were_there_are_not_waited_for(self):
        stream, _, progress, now = self.screen(80)
        progress.end(cso.Outcome("a", "present"), 10 ** 9)
        progress.add(5 * 10 ** 8)
        now[0] = 5.0
        progress.draw()
        self.assertEqual(stream.getvalue(),
                         "1/2 files, 500.0 MB of 2.0 GB, 100.0 MB/s, 5 s left")

    @unittest.skipUnless(hasattr(os, "openpty"), "no pseudo-terminals here")
    def test_on_a_pseudo_terminal(self):
        with tempfile.TemporaryDirectory() as folder, DataSpace(one_day()) as space:
            master, slave = os.openpty()
            command = [sys.executable, "-m", "cso_dataspace", "run", RC, "--env",
                       "my.work=" + folder]
            environ = dict(os.environ, PYTHONPATH=HERE, COLUMNS="50", **ENVIRON)
            with subprocess.Popen(command + at(space.url), env=environ, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=slave) as process:
                os.close(slave)
                seen = b""
                with contextlib.suppress(OSError):          # so ends a terminal on Linux
                    for data in iter(lambda: os.read(master, 65536), b""):
                        seen += data
                out = process.stdout.read()
            os.close(master)
        self.assertEqual((process.returncode, out), (0, b"8 of 8 files here: 8 verified\n"), seen)
        self.assertIn(b"/8 files, ", seen)
        self.assertNotIn(b"verified", seen)         # lines per file are for batch logs


class ProjectTest(Case):
    """The file as it is copied, vendored, installed; and the README."""

    def test_bare_copy_under_another_name(self):
        copy = self.write("copy.py", "")
        with open(cso.__file__, "rb") as source, open(copy, "wb") as target:
            target.write(source.read())
        out = subprocess.check_output([sys.executable, "-I", "-S", copy, "--version"],
                                      universal_newlines=True)
        self.assertEqual(out, "cso_dataspace %s\n" % cso.__version__)
        os.mkdir(self.path("vendor"))
        self.write("vendor/__init__.py", "")
        os.replace(copy, self.path("vendor", "_cds.py"))
        out = subprocess.check_output(
            [sys.executable, "-c", "from vendor import _cds; print(_cds.log.name, "
             "_cds.box_overlap(None, [0, 0, 1, 1]), len(_cds.__all__) == len(set(_cds.__all__)))"],
            cwd=self.folder, universal_newlines=True)
        self.assertEqual(out, "cso_dataspace (True, None) True\n")

    def test_the_settings_of_the_readme_are_those_of_the_program(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as text:
            rows = re.findall(r"(?m)^\| (`[a-z_`, .]+`) \| ([^|]+) \|", text.read())
        said = {}
        for names, defaults in rows:
            required = defaults.startswith("required")
            names, defaults = re.findall("`(.+?)`", names), re.findall("`(.+?)`", defaults)
            defaults = [] if required else defaults
            said.update(itertools.zip_longest(names, defaults[:len(names)]))
        self.assertEqual(set(said), set(cso.SETTINGS))
        for name, default in said.items():
            reader, expected = cso.SETTINGS[name]
            with self.subTest(name):
                if default and name != "area.filter":
                    self.assertEqual(reader(default), expected)

    def test_every_promised_name_is_there_with_a_docstring(self):
        for name in cso.__all__:
            self.assertTrue(getattr(cso, name).__doc__, name)

    def test_library_code_does_not_print(self):
        with open(cso.__file__, encoding="utf-8") as source:
            library = source.read().partition('\nlog = ')[2].partition("######## Command line")[0]
        found = re.search(r"\bprint\(|sys\.exit|basicConfig|[^.]\beval\(|\bexec\(", library)
        self.assertIsNone(found)
        self.assertIn("def fetch(", library)

    def test_demo(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()), \
                mock.patch.object(tempfile, "mkdtemp", lambda prefix: self.path()):
            self.assertEqual(demo(), 0)
        self.assertIn("8 of 8 files here: 8 verified", out.getvalue())
        self.assertIn("8 requests for bytes, 1 login", out.getvalue())

    @unittest.skipUnless(os.name == "posix", "its commands are those of a shell")
    def test_every_command_and_snippet_of_the_readme_runs(self):
        """Against the real names, which lead to a stand-in with https, in a fresh folder."""
        os.environ["SSL_CERT_FILE"], tls = certificate(self.folder, NAMES)
        space = self.use(DataSpace(one_day(), tls=tls, users={"me@example.com": "secret"}))
        self.use(names_on_loopback({name: space for name in NAMES}))
        os.environ["SLURM_ARRAY_TASK_ID"] = "2"
        shutil.copy(RC, self.folder)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        tested_elsewhere = ("cp ", "python3 -m pip", "python3 test_", "python3 -m unittest")
        commands = [line for block in readme("") + readme("sh") for line in block.splitlines()
                    if line.strip() and not line.startswith(tested_elsewhere + ("#",))]
        self.assertEqual(len(commands), 10)
        for line in commands:
            with self.subTest(line=line):
                if line.startswith("export "):
                    name, _, value = line.split()[1].partition("=")
                    os.environ[name] = os.path.expandvars(value)
                elif line.startswith("python3 -m cso_dataspace "):
                    status, out, err = self.run_main(*shlex.split(os.path.expandvars(line))[3:])
                    self.assertEqual(status, 0, out + err)
                else:
                    subprocess.check_call(["sh", "-c", line])
        for block in readme("python"):
            with self.subTest(block=block), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, "README.md", "exec"), {})
        self.assertEqual(os.path.getsize("data/orbit.nc"), 20000)


def demo():
    """The main job on the stand-in, with example.rc: no network, no account."""
    folder = tempfile.mkdtemp(prefix="cso_demo_")
    recorded = list(RECORDS)
    with DataSpace(recorded + list(one_day())) as space:
        command = ["run", RC, "--env", "my.work=" + folder] + at(space.url)
        print("A stand-in of the Data Space listens at %s with %d recorded products of Sentinel-1\n"
              "to -6 and the 14 made-up NO2 orbits of 1 July 2018. Files have made-up contents.\n"
              % (space.url, len(recorded)))
        print("$ python3 -m cso_dataspace %s" % " ".join(map(shlex.quote, command)), flush=True)
        with mock.patch.dict(os.environ, ENVIRON):
            status = cso.main(command)
        sys.stderr.flush()
        print("\nThe table and the files:")
        for top, _, names in os.walk(folder):
            for name in sorted(names):
                path = os.path.join(top, name)
                print("%8d  %s" % (os.path.getsize(path), path))
        table, = (name for name in os.listdir(folder) if name.endswith(".csv"))
        print("\nThe first rows of the table:")
        with open(os.path.join(folder, table), encoding="utf-8") as text:
            for line in itertools.islice(text, 3):
                print(line.rstrip())
        print("\nThe service saw %d requests for bytes, %d login, at most %d transfers at once."
              % (space.count("value"), space.logins, space.peak_transfers))
    return status


# Each figure is a ratio of whole processes, run by turns in one go; the stand-in is a process of
# its own.  A child prints the peak of its memory as its last line, as the system knows it.

PEAK = """
def peak():
    try:
        with open("/proc/self/status") as status:
            return int(status.read().partition("VmHWM:")[2].split()[0]) / 1024
    except OSError:
        import resource, sys
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2 ** 20 if sys.platform == "darwin" else 2 ** 10)
"""
OURS = PEAK + "import sys, cso_dataspace as cso\nassert cso.main(sys.argv[1:]) == 0\nprint(peak())"
BARE = PEAK + """
import json, sys, urllib.request
rows = []
for skip in range(0, 10000, 1000):
    url = sys.argv[1] + "/Products?$filter=Collection/Name%20eq%20'SENTINEL-5P'"
    url += "&$orderby=ContentDate/Start&$top=1000&$skip=%d" % skip
    with urllib.request.urlopen(url) as page:
        rows += [(one["Id"], one["Name"]) for one in json.loads(page.read().decode())["value"]]
assert len(rows) == 10000
print(peak())"""
BASE = ("import urllib.request, json, ssl, csv, argparse, concurrent.futures, "
        "concurrent.futures.thread")
SERVED = {"list-5": lambda: DataSpace(made_products(10000), keep_pages=True),
          "list-301": lambda: DataSpace(made_products(10000, points=301), keep_pages=True),
          "large": lambda: DataSpace(made_products(1), content_size=2 ** 30),
          "files": lambda: DataSpace(made_products(200, points=41), content_size=10 ** 6)}


def serve(kind):
    """Be a stand-in until the standard input ends, then tell what was seen."""
    with SERVED[kind]() as space:
        print(space.url, flush=True)
        sys.stdin.read()
        print(json.dumps([space.count("value"), space.logins, space.peak_transfers]), flush=True)


@contextlib.contextmanager
def served(kind, seen=None):
    with subprocess.Popen([sys.executable, os.path.abspath(__file__), "serve", kind],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          universal_newlines=True) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()
        (seen if seen is not None else []).extend(json.loads(process.stdout.readline()))


def timed(command, folder):
    """Return (wall seconds, CPU seconds, peak MB or None) of a process that must succeed."""
    environ = dict(os.environ, PYTHONPATH=HERE, NO_PROXY="*", **ENVIRON)
    environ.pop("PYTHONDONTWRITEBYTECODE", None)        # measured as it is used, compiled once
    before, began = os.times(), time.perf_counter()
    out = subprocess.check_output(command, env=environ, cwd=folder, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    last = out.decode().split()[-1:]
    cpu = sum(after[2:4]) - sum(before[2:4])            # of children: user, system
    return wall, cpu, float(last[0]) if last and re.match(r"[\d.]+$", last[0]) else None


def compared(ours, theirs, folder, runs=5):
    """Return the medians of two commands run by turns: [(wall, cpu, peak)] * 2."""
    results = [], []
    for turn in range(runs + 1):
        for command, result in zip((ours, theirs), results):
            figures = timed(command, fresh(folder))
            if turn:                            # the first one warms the caches
                result.append(figures)
    return [[statistics.median(column) if None not in column else None for column in zip(*result)]
            for result in results]


def python(code, *args):
    return [sys.executable, "-c", code] + list(args)


def benchmark():
    """Print the figures of this module against bare Python and curl, on this machine."""
    print("Python %s on %s, %d processors; medians of 5 runs, each beside its yardstick"
          % (platform.python_version(), platform.platform(), os.cpu_count()))
    folder = os.path.join(tempfile.mkdtemp(), "run")
    figures_of_start(folder)
    for points, limit in (5, 45), (301, 80):
        figures_of_listing(folder, points, limit)
    figures_of_large_file(folder)
    figures_of_many_files(folder)
    figures_of_overlap()
    shutil.rmtree(os.path.dirname(folder))
    return 0


def figures_of_start(folder):
    ours, base = compared(python("import cso_dataspace"), python(BASE), folder, 15)
    print("import: %.2f times the CPU of the standard library modules (at most 1.3)"
          % (ours[1] / base[1]))
    ours, base = compared([sys.executable, "-m", "cso_dataspace", "--help"], python("pass"), folder)
    print("--help: %.2f s, bare Python %.2f s (at most 0.2)" % (ours[0], base[0]))


def job(command, space_url, *settings):
    """The command that lists, or fetches, all that a stand-in has, by example.rc."""
    whole = ("timerange.start=2018-01-01", "timerange.end=2030-01-01", "area=", "selection=",
             "best=F", "output.file=table.csv", "download.dir=files") + settings
    return python(OURS, command, RC, *at(space_url, *whole))


def figures_of_listing(folder, points, limit):
    with served("list-%d" % points) as url:
        ours, bare = compared(job("inquire", url), python(BARE, url + "/odata/v1"), folder)
        for _ in range(2):                      # the first one warms the caches
            near = timed(job("inquire", url, "area=-30,30,35,76"), fresh(folder))
    print("list 10,000 of %d points: %.2f times a bare loop in time, %.2f in CPU (at most 1.5); "
          "%.0f MB, bare loop %.0f MB; with an area %.2f times, %.0f MB (at most %d)"
          % (points, ours[0] / bare[0], ours[1] / bare[1], ours[2], bare[2], near[0] / bare[0],
             near[2], limit))


def figures_of_large_file(folder):
    if not shutil.which("curl"):
        print("curl is not here: no figures of transfers")
        return
    with served("large") as url:
        ours, curl = compared(job("run", url), curl_of(url, 1), folder, 3)
    print("one file of 1 GiB with MD5: %.2f of the rate of curl without MD5 (at least 0.5), "
          "%.0f MB/s; %.0f MB of memory (at most 35)"
          % (curl[0] / ours[0], 2 ** 30 / 1e6 / ours[0], ours[2]))


def figures_of_many_files(folder):
    if not shutil.which("curl"):
        return
    seen = []
    with served("files", seen) as url:
        ours = [timed(job("run", url), fresh(folder)) for _ in range(5)]
        seen_by_curl = curl_of(url, 200)
        curl = [timed(seen_by_curl, fresh(folder)) for _ in range(5)]
    requests = (seen[0] - 5 * 200) / 5.0
    print("200 files of 1 MB: %.2f times curl -Z in time (at most 2); %g requests for bytes and %g "
          "logins a run, at most %d transfers at once"
          % (statistics.median(run[0] for run in ours) / statistics.median(run[0] for run in curl),
             requests, (seen[1] - 1) / 5.0, seen[2]))


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder)
    return folder


def curl_of(url, count):
    """The command by which curl fetches the first products of a stand-in, four at once."""
    fields = urllib.parse.urlencode({"grant_type": "password", "username": "user",
                                     "password": "password", "client_id": "cdse-public"})
    with urllib.request.urlopen(url + AUTH + "token", fields.encode()) as answer:
        token = json.loads(answer.read().decode())["access_token"]
    command = ["curl", "-sS", "--fail", "-H", "Authorization: Bearer " + token]
    command += ["-Z", "--parallel-max", "4"] if count > 1 else []
    for number, record in enumerate(made_products(count)):
        command += [url + "/odata/v1/Products(%s)/$value" % record.id, "-o", "%d.nc" % number]
    return command


def figures_of_overlap():
    geometries = [record.geometry for record in made_products(100, points=301)]
    geometries = [made() if callable(made) else made for made in geometries]
    for name, box in ("an area as large as Europe", [-30, 30, 35, 76]), ("a city", [4, 51, 6, 53]):
        began = time.perf_counter()
        found = sum(cso.box_overlap(geometry, box)[0] for geometry in geometries)
        spent = time.perf_counter() - began
        print("box_overlap of 301 points and %s: %.0f us a call, %d of 100 overlap"
              % (name, spent * 1e4, found))
    far = {"type": "Polygon", "coordinates": [[[100 + k / 300, 10 + k % 7] for k in range(300)]
                                              + [[100, 10]]]}
    began = time.perf_counter()
    for _ in range(1000):
        cso.box_overlap(far, [4, 51, 6, 53])
    print("box_overlap of a product nowhere near: %.0f us" % ((time.perf_counter() - began) * 1e3))


if __name__ == "__main__":
    if sys.argv[1:] == ["demo"]:
        sys.exit(demo())
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2]))
    if sys.argv[1:] == ["benchmark"]:
        sys.exit(benchmark())
    unittest.main()
