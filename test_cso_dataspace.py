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
import datetime
import email.utils
import functools
import hashlib
import http.client
import http.server
import io
import itertools
import json
import math
import operator
import os
import re
import select
import shlex
import shutil
import socket
import socketserver
import ssl
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
    online: bool = True

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


def typed_geometry(kind, words):
    """GeoJSON from words `x,y`; `|` begins the next part."""
    lines = [[[float(number) for number in point.split(',')] for point in part.split()]
             for part in ' '.join(words).split('|')]
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
        raise BadRequest('Invalid value: %s' % text)
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
                     typed_geometry(words[0], words[1:]) if words != ['-'] else None)


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

9f3cd9db-235a-425c-ab6f-2b9a8d8afaf0
S5P_NRTI_L2__CLOUD__20230722T125402_20230722T125902_29909_03_020500_20230722T134051.nc
2023-07-22T12:53:57 2023-07-22T12:59:08 2023-07-22T13:49:07.661601 48458169
Polygon -1.9,-19.1 0.5,-37.1 16,-33.6 29.5,-31.2 26.5,-24.2 22.9,-13.7 13.6,-14.9 6.4,-16.6
-1.9,-19.1

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

1f26f05c-2ed7-4bc7-a26c-664c1676238a
S5P_NRTI_L2__CO_____20230623T220849_20230623T221349_29503_03_020500_20230623T224716.nc
2023-06-23T22:08:43 2023-06-23T22:13:56 2023-06-23T22:58:23.518073 18568248
Polygon -141.3,-11.6 -138.5,-29.7 -129.3,-27.1 -122.9,-25.6 -111.8,-24 -114.3,-16.9 -117.4,-6.2
-128.5,-7.5 -141.3,-11.6

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

2e600202-211f-4002-82fd-26eaee48c406
S5P_RPRO_L2__O3_____20180430T070451_20180430T084820_02822_01_010000_20180605T215159.nc
2018-04-30T07:27:26 2018-04-30T08:25:49 2023-05-10T12:08:46.137766 256832578
Polygon -71,51.9 30.8,62.2 65.8,22.2 94.3,-85.1 149.3,-79 105,-26.3 89.6,57.2 106.5,82.4
180,86.4 180,90 -180,90 -180,86.4 -131.8,82.9 -71,51.9

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

36ddb129-31e3-4434-ae81-0101be9b0b6c
S5P_NRTI_L2__SO2____20240410T191656_20240410T192156_33644_03_020601_20240410T195701.nc
2024-04-10T19:16:51 2024-04-10T19:22:02 2024-04-10T20:05:12.340601 117530264
Polygon -103.2,15.7 -98.6,-2.2 -88.4,1.3 -83,2.4 -74.9,3.1 -78.3,21.1 -89.7,20.4 -95.3,18.9
-103.2,15.7

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

6519e3ca-6a47-5f55-8f78-ba772cf4b73f
S3A_SR_2_WAT____20171230T235920_20171231T004449_20180125T182547_2729_026_144______MAR_O_NT_003.SEN3
2017-12-30T23:59:19.623106 2017-12-31T00:44:49.496898 2018-01-25T18:43:17.973000
58197165 SR_2_WAT___ 9742 NT
LineString -4.6,-70.5 -18.4,-55.3 -24.3,-41.3 -28.5,-27.1 -41.1,26.5 -45.3,40.8 -51.2,54.8
-55.6,61.7 -62.3,68.5 -74,74.8 -83.7,77.5 -98.2,79.8 -130.7,81.4

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

@functools.lru_cache(maxsize=None)
def half_orbit_at_greenwich(points):
    """(longitude, latitude) around the daylight half of an orbit that crosses the equator at 0.

    1300 km to either side of the track; as in the product files the ring is not cut anywhere."""
    tilt, half, turn = math.radians(98.7), math.radians(11.7), 25.4 / 360
    reach, along = (100 if points > 20 else 70), (points - 1) // 2

    def place(side, arc):
        u = math.radians(arc)
        track = (math.cos(u), math.cos(tilt) * math.sin(u), math.sin(tilt) * math.sin(u))
        left = (0, -math.sin(tilt), math.cos(tilt))
        x, y, z = (math.cos(half) * t + side * math.sin(half) * p for t, p in zip(track, left))
        return math.degrees(math.atan2(y, x)) - arc * turn, round(math.degrees(math.asin(z)), 4)
    arcs = [reach * (2 * k / (along - 1) - 1) for k in range(along)]
    ring = [place(-1, arc) for arc in arcs] + [place(1, arc) for arc in reversed(arcs)]
    return ring + ring[:1]


def half_orbit(middle, points):
    """The outline of an orbit that crosses the equator at `middle`, at 13:30 local time."""
    east = 15 * (13.5 - middle.hour - middle.minute / 60 - middle.second / 3600)
    return {'type': 'Polygon', 'coordinates': [[
        [round((x + east + 180) % 360 - 180, 4), y] for x, y in half_orbit_at_greenwich(points)]]}


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


def records_of_page(space, request, matches, skip, most):
    """The records of a page, and how many to skip for the next one, or None."""
    trick = request.trick.get('kind')
    if trick == 'empty-page':
        return [], skip
    most = max(1, most // 2) if trick == 'short-page' else min(most, space.page_limit or most)
    first = 0 if trick == 'repeat' else skip
    places = matches.first(first + most + 1)[first:]
    records = [space.records[place] for place in places[:most]]
    if trick == 'repeat':
        return records, skip if request.trick.get('same_link') else skip + len(records)
    return records, skip + most if len(places) > most > 0 else None


# ---- OData

class Condition(typing.NamedTuple):
    """A test of records, and the starts between which all lie that pass it."""
    test: object
    low: str = ''
    high: str = '~'


def all_of(needs):
    return Condition(lambda record: all(need.test(record) for need in needs),
                     max(need.low for need in needs), min(need.high for need in needs))


def any_of(options):
    return Condition(lambda record: any(option.test(record) for option in options),
                     min(o.low for o in options), max(o.high for o in options))


COMPARE = {'eq': operator.eq, 'ge': operator.ge, 'gt': operator.gt, 'le': operator.le,
           'lt': operator.lt}
COLLECTIONS = ('SENTINEL-1', 'SENTINEL-2', 'SENTINEL-3', 'SENTINEL-5P', 'SENTINEL-6')
TIMES = {'ContentDate/Start': 'start', 'ContentDate/End': 'end', 'PublicationDate': 'published',
         'ModificationDate': 'published', 'OriginDate': 'published'}
TEXT_TESTS = {'startswith': str.startswith, 'endswith': str.endswith, 'contains': str.__contains__}
ATTRIBUTES = collections.OrderedDict((
    ('productType', lambda r: r.producttype),
    ('orbitNumber', lambda r: r.orbit),
    ('timeliness', lambda r: r.timeliness),
    ('platformShortName', lambda r: r.collection),
    ('processingMode', lambda r: r.stream),
    ('processingLevel', lambda r: r.stream and r.producttype[:3].rstrip('_')),
    ('processorVersion', lambda r: r.stream and r.name[61:67].lstrip('0')),
    ('baselineCollection', lambda r: r.stream and r.name[58:60])))


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


def text_condition(word, text):
    return Condition(lambda record: TEXT_TESTS[word](record.name, unquoted(text)))


def attribute_condition(kind, _, name, word, text):
    wanted, compare = unquoted(text) if text[0] == "'" else float(text), COMPARE[word]
    if (kind == 'String') != isinstance(wanted, str) or name not in ATTRIBUTES:
        raise BadRequest('Invalid attribute: %s' % name)
    known = ATTRIBUTES[name]
    return Condition(lambda record: known(record) is not None and compare(known(record), wanted))


def area_condition(text):
    found = re.match(r'SRID=4326;(POINT|POLYGON) ?\(+([-+.\deE, ]+)\)+$', text)
    if not found:
        raise BadRequest('Invalid geography value: %s' % text)
    points = [[float(number) for number in pair.split()] for pair in found.group(2).split(',')]
    if found.group(1) == 'POLYGON' and (points[0] != points[-1] or len(points) < 4):
        raise BadRequest('Points of LinearRing do not form a closed linestring')
    return Condition(lambda record: meets_box(record.footprint, bounding_box(points)))


QUOTED = r"'(?:[^']|'')*'"
ATOMS = (
    (r"Collection/Name eq (%s)" % QUOTED, collection_condition),
    (r"Name eq (%s)" % QUOTED, lambda text: Condition(lambda r: r.name == unquoted(text))),
    (r"Online eq (true|false)", lambda text: Condition(lambda r: r.online == (text == 'true'))),
    (r"(startswith|endswith|contains)\(Name, ?(%s)\)" % QUOTED, text_condition),
    (r"(%s) (eq|ge|gt|le|lt) ([\d:TZ.+-]+)" % '|'.join(TIMES), time_condition),
    (r"Attributes/OData\.CSC\.(\w+)Attribute/any\((\w+): ?\2/Name eq '(\w+)' and "
     r"\2/OData\.CSC\.\1Attribute/Value (eq|ge|gt|le|lt) (%s|[-\d.]+)\)" % QUOTED,
     attribute_condition),
    (r"OData\.CSC\.Intersects\(area=geography'([^']*)'\)", area_condition))


class FilterText:
    """The $filter grammar by recursive descent: or, and, not, parentheses, atoms."""

    def __init__(self, text):
        self.rest = text.strip()

    def take(self, pattern):
        found = re.match(pattern, self.rest)
        self.rest = self.rest[found.end():] if found else self.rest
        return found

    def parse(self):
        whole = self.chain('or', any_of, lambda: self.chain('and', all_of, self.single))
        if self.rest:
            raise BadRequest('Invalid field: %s' % self.rest.split()[0])
        return whole

    def chain(self, word, combine, part):
        links = [part()]
        while self.take(r'\s+%s\s+' % word):
            links.append(part())
        return combine(links)

    def single(self):
        if self.take(r'not\b\s*'):
            inner = self.single()
            return Condition(lambda record: not inner.test(record))
        if self.take(r'\(\s*'):
            inner = self.chain('or', any_of, lambda: self.chain('and', all_of, self.single))
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
    ('Online', lambda space, r: r.online),
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
        if name not in ('$filter', '$orderby', '$top', '$skip', '$count', '$expand', '$select'):
            raise BadRequest('Invalid query parameter: %s' % name)
        if name == '$expand' and value not in ('Attributes', 'Assets', 'Locations'):
            raise BadRequest('Invalid $expand value: %s' % value)
    top, skip = odata_number(request, '$top', 20, 1000), odata_number(request, '$skip', 0, 10000)
    order = re.match(r'(%s|)( asc| desc|)$' % '|'.join(TIMES), request.query.get('$orderby', ''))
    if not order:
        raise BadRequest('Invalid $orderby value: %s' % request.query['$orderby'])
    text = request.query.get('$filter') or 'Online eq true or Online eq false'
    matches = space.matches(text, FilterText(text).parse(), TIMES.get(order.group(1), 'id'),
                            order.group(2) == ' desc')
    records, following = records_of_page(space, request, matches, skip, top)
    page = odata_context(request)
    if request.query.get('$count', '').lower() == 'true':
        page['@odata.count'] = matches.count()
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

    def __init__(self, clock, users, totp, expires_in, refresh_expires_in, login_status,
                 revoke_on_refresh):
        self.clock, self.users, self.totp = clock, users, totp
        self.expires_in, self.refresh_expires_in = expires_in, refresh_expires_in
        self.login_status, self.revoke_on_refresh = login_status, revoke_on_refresh
        self.lock = threading.Lock()
        self.access, self.renewal = {}, {}          # token: (session, end)
        self.made = self.logins = self.refreshes = self.logouts = self.refused = 0

    def login(self, fields):
        code = self.totp() if callable(self.totp) else self.totp
        with self.lock:
            if (fields.get('username'), fields.get('password')) not in self.users.items() or (
                    code and fields.get('totp') != code):
                self.refused += 1
                return oauth_error(self.login_status, 'invalid_grant', 'Invalid user credentials')
            self.logins += 1
            return self.give('session-%d' % self.logins)

    def refresh(self, text):
        with self.lock:
            session, end = self.renewal.pop(text, (None, 0))
            if session is None or end <= self.clock():
                return oauth_error(400, 'invalid_grant', 'Token is not active')
            self.refreshes += 1
            if self.revoke_on_refresh:
                self.drop(session)
            return self.give(session)

    def logout(self, text):
        with self.lock:
            session, _ = self.renewal.pop(text, (None, 0))
            if session is None:
                return oauth_error(400, 'invalid_grant', 'Invalid refresh token')
            self.logouts += 1
            self.drop(session)
            return Answer(status=204)

    def drop(self, session):
        for text in [text for text, (owner, _) in self.access.items() if owner == session]:
            del self.access[text]

    def give(self, session):
        self.made += 1
        access, renewal = ('eyJ.%s.%s.%d' % (kind, session, self.made) for kind in 'ar')
        self.access[access] = session, self.clock() + self.expires_in
        self.renewal[renewal] = session, self.clock() + (self.refresh_expires_in or 3600)
        fields = {'access_token': access, 'expires_in': self.expires_in,
                  'refresh_expires_in': self.refresh_expires_in, 'refresh_token': renewal,
                  'token_type': 'Bearer', 'not-before-policy': 0, 'session_state': session,
                  'scope': 'AUDIENCE_PUBLIC openid email profile ondemand_processing user-context'}
        return json_answer({name: value for name, value in fields.items() if value is not None})

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
    """The content or the part of it that is asked; If-Range is obeyed."""
    size, version = space.size(record), space.versions[record.id]
    etag = '"%s-%d"' % (record.id, version)
    unchanged = request.headers.get('If-Range', etag) == etag
    wanted = byte_span(request.range, size) if unchanged else None
    if wanted == ():
        answer = zip_problem(416, 416, 'Requested range not satisfiable')
        answer.headers['Content-Range'] = 'bytes */%d' % size
        return answer
    first, last = wanted or (0, size - 1)
    name = record.name if record.name.endswith('.nc') else record.name + '.zip'
    answer = Answer(b'', 206 if wanted else 200, 'application/octet-stream', {
        'Accept-Ranges': 'bytes', 'ETag': etag,
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


def field_is(name):
    return lambda text: Condition(lambda record: getattr(record, name) == text)


def resto_box(text):
    box = [float(number) for number in text.split(',')]
    return Condition(lambda record: meets_box(record.footprint, box))


def resto_geometry(text):
    numbers = [float(number) for number in re.findall(r'-?\d+(?:\.\d+)?', text)]
    box = bounding_box(list(zip(numbers[::2], numbers[1::2])))
    return Condition(lambda record: meets_box(record.footprint, box))


def resto_orbit(text):
    found = re.match(r'\[?(\d+)(?:,(\d+)([\[\]]))?$', text)
    if not found:
        raise BadRequest("Proper value types for specified attribute query parameters are: "
                         "'orbitNumber'-integer")
    low, high, edge = found.groups()
    return Condition(lambda r: int(low) <= r.orbit <= int(high or low) - (edge == '['))


def resto_status(text):
    if text not in ('ONLINE', 'OFFLINE', 'ALL'):
        raise BadRequest("Input should be 'ONLINE', 'OFFLINE' or 'ALL'.")
    return Condition(lambda record: text == 'ALL' or record.online == (text == 'ONLINE'))


# A product is found if it lies within startDate and completionDate: containment, not overlap.
RESTO_TESTS = {
    'startDate': lambda text: Condition(lambda r: r.start >= as_time(text), low=as_time(text)),
    'completionDate': lambda text: Condition(lambda r: r.end <= as_time(text), high=as_time(text)),
    'publishedAfter': lambda text: Condition(lambda r: r.published >= as_time(text)),
    'publishedBefore': lambda text: Condition(lambda r: r.published <= as_time(text)),
    'productType': field_is('producttype'), 'identifier': field_is('id'),
    'timeliness': field_is('timeliness'), 'orbitNumber': resto_orbit, 'status': resto_status,
    'productIdentifier': lambda text: Condition(lambda record: s3_path(record) == text),
    'box': resto_box, 'geometry': resto_geometry}
RESTO_IGNORED = set(
    'maxRecords page index sortParam sortOrder exactCount processingLevel platform instrument '
    'sensorMode relativeOrbitNumber orbitDirection processingBaseline cloudCover lon lat radius '
    'published updated'.split())
RESTO_ORDER = {'startDate': 'start', 'completionDate': 'end', 'published': 'published',
               'updated': 'published', None: 'id'}


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
    unknown = [name for name in request.query
               if name not in RESTO_IGNORED and name not in RESTO_TESTS]
    if unknown:
        raise Refused(resto_refusal(400, 'Unknown query parameter(s).', {
            'loc': unknown, 'msg': 'Query parameters do not exist.'}))
    tests = [Condition(lambda record: collection in (None, record.collection))]
    for name in request.query:
        try:
            tests += [RESTO_TESTS[name](request.query[name])] if name in RESTO_TESTS else []
        except (BadRequest, ValueError) as error:
            raise resto_invalid([name], str(error))
    return all_of(tests)


def resto_numbers(query):
    """How many to skip, and maxRecords."""
    numbers = {}
    for name, default, high in (('maxRecords', 20, 2000), ('page', 1, None), ('index', 1, 10001)):
        text = query.get(name, str(default))
        if not text.isdigit():
            raise resto_invalid([name], 'Input should be a valid integer.')
        if high and int(text) > high:
            raise resto_invalid([name], 'Input should be less than or equal to %d.' % high)
        numbers[name] = int(text)
    skip = (numbers['page'] - 1) * numbers['maxRecords'] + numbers['index'] - 1
    if not 0 <= skip <= 10000:
        raise resto_invalid(['page', 'maxRecords', 'index'], (
            "The '(page - 1) * maxRecords + index - 1' should be less than 10000. By default, "
            "'maxRecords' is set to 20, while both 'page' and 'index' are set to 1 if not "
            "specified."))
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
        raise resto_invalid(['sortParam'], 'Input should be startDate, completionDate, published '
                                           'or updated.')
    asked = {name: value for name, value in request.pairs if name in RESTO_TESTS}
    asked['collection'] = collection
    matches = space.matches(json.dumps(asked), condition, RESTO_ORDER[query.get('sortParam')],
                            query.get('sortOrder') == 'descending')
    records, following = records_of_page(space, request, matches, skip, most)
    exact = query.get('exactCount') == '1'
    return json_answer({'type': 'FeatureCollection', 'properties': {
        'id': NO_TRACE, 'totalResults': matches.count() if exact else None,
        'exactCount': int(exact), 'startIndex': skip + 1, 'itemsPerPage': most,
        'query': {'originalFilters': asked, 'appliedFilters': asked, 'processingTime': 0.016},
        'links': list(resto_links(request, most, skip, following))},
        'features': [resto_feature(space, request, record) for record in records]})


def resto_links(request, most, skip, following):
    pages = [('self', {})]
    if skip:
        pages += [('previous', {'page': max(1, skip // most)}), ('first', {'page': 1})]
    if following is not None and following <= 10000:
        even = following % most == 0 and 'index' not in request.query
        pages.append(('next', {'page': following // most + 1} if even else
                      {'page': 1, 'index': following + 1}))
    for rel, changes in pages:
        yield {'rel': rel, 'type': 'application/json', 'title': rel, 'href': request.link(changes)}


def resto_feature(space, request, record):
    """A product as OpenSearch wrote it."""
    version = record.name[61:67] if record.stream else ''
    return {'type': 'Feature', 'id': record.id, 'geometry': record.footprint, 'properties': {
        'collection': record.collection, 'status': 'ONLINE' if record.online else 'OFFLINE',
        'license': {'licenseId': 'unlicensed', 'hasToBeSigned': 'never', 'viewService': 'public',
                    'signatureQuota': -1, 'description': {'shortName': 'No license'}},
        'productIdentifier': s3_path(record), 'parentIdentifier': None, 'title': record.name,
        'description': 'The Copernicus Sentinel missions', 'organisationName': None,
        'startDate': record.start, 'completionDate': record.end,
        'productType': record.producttype, 'processingLevel': '', 'platform': record.name[:3],
        'instrument': None, 'resolution': 0, 'sensorMode': None, 'orbitNumber': record.orbit,
        'quicklook': None, 'thumbnail': None, 'updated': record.published,
        'published': record.published, 'snowCover': 0, 'cloudCover': 0, 'gmlgeometry': None,
        'centroid': {'type': None, 'coordinates': None}, 'orbitDirection': None,
        'timeliness': record.timeliness, 'relativeOrbitNumber': 0,
        'processingBaseline': float(version) if version.isdigit() else 0,
        'services': {'download': {
            'url': '%s/download/%s' % (request.base, record.id),
            'mimeType': 'application/octet-stream', 'size': space.stated_size(record)}},
        'links': [{
            'rel': 'self', 'type': 'application/json', 'title': 'GeoJSON link for ' + record.id,
            'href': '%s/resto/collections/%s/%s.json' % (
                request.base, record.collection, record.id)}]}}


# ---- STAC, as stac-fastapi with pgstac answers

TYPES_5P = (
    'L2__AER_AI', 'L2__AER_LH', 'L2__CH4___', 'L2__CLOUD_', 'L2__CO____', 'L2__HCHO__',
    'L2__NO2___', 'L2__NP_BD3', 'L2__NP_BD6', 'L2__NP_BD7', 'L2__O3____', 'L2__O3_TCL',
    'L2__O3__PR', 'L2__SO2___') + tuple('L1B_RA_BD%d' % band for band in range(1, 9))
BAND = typed_geometry('Polygon', '180,-20 -180,-20 -180,20 180,20 180,-20'.split())


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


def stac_error(status, code, text):
    return json_answer({'code': code, 'description': text}, status)


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


def stac_one(space, request):
    name, known = request.names[0], space.stac_collections()
    if name not in known:
        return stac_error(404, 'NotFoundError', 'Collection %s does not exist.' % name)
    return json_answer(stac_document(request, name, known[name]))


FIRST_PAGE = 'bmV4dDow'             # next:0 in base64


def stac_search(space, request):
    """A page of /v1/search, asked by GET or POST."""
    try:
        search = json.loads(request.body.decode()) if request.method == 'POST' else request.query
        limit = int(search.get('limit', 10))
    except ValueError as error:
        return stac_error(400, 'RequestValidationError', str(error))
    try:
        skip = int(base64.urlsafe_b64decode(search.get('token', FIRST_PAGE)).decode()[5:])
    except ValueError:
        return Answer(b'Internal Server Error', 500, 'text/plain; charset=utf-8')
    tests = [Condition(lambda record: stac_collection(record) is not None)]
    tests += [STAC_TESTS[name](search[name]) for name in sorted(STAC_TESTS) if search.get(name)]
    text = json.dumps([search.get(name) for name in sorted(STAC_TESTS)])
    matches = space.matches(text, all_of(tests), *stac_order(search.get('sortby')))
    records, following = records_of_page(space, request, matches, skip, limit)
    items = [chosen_fields(stac_item(space, request, record), search.get('fields'))
             for record in records]
    links = [{'rel': 'self', 'href': request.base + request.target}]
    if following is not None:
        links.append(stac_next(space, request, search, following))
    return json_answer({'type': 'FeatureCollection', 'features': items, 'links': links,
                        'numberReturned': len(items)}, **{'Content-Type': 'application/geo+json'})


def stac_next(space, request, search, following):
    """The next link: by GET, or by POST with the whole body where asked so or told so."""
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


def stac_filter(value):
    """product:type = 'X', in cql2-text or cql2-json; with `and` where there are more."""
    if isinstance(value, dict):
        needs = value['args'] if value['op'] == 'and' else [value]
        pairs = [(need['args'][0]['property'], need['args'][1]) for need in needs]
    else:
        pairs = re.findall(r"\"?([\w:.]+)\"?\s*=\s*'([^']*)'", value)
    if {name.replace('properties.', '') for name, _ in pairs} != {'product:type'}:
        raise BadRequest('Filter not understood by the stand-in: %s' % value)
    return Condition(lambda record: all(record.producttype == wanted for _, wanted in pairs))


STAC_TESTS = {
    'collections': lambda value: Condition(lambda r: stac_collection(r) in as_list(value)),
    'ids': lambda value: Condition(lambda record: stac_id(record) in as_list(value)),
    'datetime': stac_period, 'bbox': stac_box, 'intersects': stac_area, 'filter': stac_filter}
STAC_ORDER = {'datetime': 'start', 'start_datetime': 'start', 'end_datetime': 'end',
              'id': 'name', 'published': 'published'}


def stac_order(sortby):
    """The field, and whether descending; the newest first where nothing is asked."""
    if isinstance(sortby, list):
        sortby = ('-' if sortby[0].get('direction') == 'desc' else '') + sortby[0]['field']
    sortby = (sortby or '-datetime').split(',')[0]
    name = sortby.lstrip('+- ').replace('properties.', '')
    if name not in STAC_ORDER:
        raise BadRequest('Sort field not understood by the stand-in: %s' % name)
    return STAC_ORDER[name], sortby.startswith('-')


def chosen_fields(item, fields):
    """The item with the fields asked: `a.b` keeps only these, `-a.b` leaves these out."""
    if isinstance(fields, dict):
        fields = fields.get('include', []) + ['-' + name for name in fields.get('exclude', [])]
    kept, names = {}, as_list(fields or [])
    wanted = [name.lstrip('+ ') for name in names if not name.startswith('-')]
    for name in wanted and wanted + ['id', 'collection']:
        outer, _, inner = name.partition('.')
        if not inner and outer in item:
            kept[outer] = item[outer]
        elif inner in item.get(outer, ()):
            kept.setdefault(outer, {})[inner] = item[outer][inner]
    item = kept or item
    for name in (name[1:] for name in names if name.startswith('-')):
        outer, _, inner = name.partition('.')
        (item.get(outer, {}) if inner else item).pop(inner or outer, None)
    return item


AUTH = '/auth/realms/CDSE/protocol/openid-connect/'
ROUTES = (
    ('value', ('GET',), r'/odata/v1/Products\(([^)]*)\)(?:/Nodes\((.*)\))?/\$value', product_value),
    ('product', ('GET',), r'/odata/v1/Products\(([^)]*)\)', odata_single),
    ('odata', ('GET',), r'/odata/v1/Products', odata_page),
    ('opensearch', ('GET',), r'/resto/api/collections(?:/([^/]+))?/search\.json', resto_search),
    ('stac', ('GET', 'POST'), r'/v1/search', stac_search),
    ('stac', ('GET',), r'/v1/collections/([^/]+)', stac_one),
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


@fault('fin', 'rst', 'stall-body')
def fault_end(space, request, respond, detail):
    """The connection ends, or falls silent, after `at` bytes of the body."""
    answer = respond()
    answer.keep(place_of_fault(answer, detail)).end = detail['kind']
    return answer


@fault('drop', 'stall-headers')
def fault_silence(space, request, respond, detail):
    answer = Answer(status=None)
    answer.end = detail['kind']
    return answer


@fault('cut', 'cut-json')
def fault_cut(space, request, respond, detail):
    """Body and Content-Length end together after `at` bytes, so only the catalogue knows."""
    answer = respond()
    answer.length = place_of_fault(answer, detail)
    return answer.keep(answer.length)


@fault('chunked', 'chunked-ok')
def fault_chunked(space, request, respond, detail):
    """In chunks; the last of them is missing, or all is well."""
    answer = respond()
    answer.chunked = True
    if detail['kind'] == 'chunked':
        answer.keep(place_of_fault(answer, detail)).end = 'fin'
    return answer


@fault('no-length')
def fault_no_length(space, request, respond, detail):
    answer = respond()
    answer.length = None
    return answer


@fault('flip')
def fault_flip(space, request, respond, detail):
    answer = respond()
    body = bytearray(answer.body)
    body[place_of_fault(answer, detail)] ^= 1
    answer.blocks = [bytes(body)]
    return answer


@fault('zip')
def fault_zip(space, request, respond, detail):
    """The file in a zip beside its .cdl, as S5P products came until the end of 2024."""
    request.range = None
    answer = respond()
    if answer.record:
        packed, stem = io.BytesIO(), answer.record.stem
        with zipfile.ZipFile(packed, 'w') as archive:
            archive.writestr('%s/%s.nc' % (stem, stem), answer.body)
            archive.writestr('%s/%s.cdl' % (stem, stem), 'netcdf x {\n}\n')
        answer.blocks, answer.length = [packed.getvalue()], len(packed.getvalue())
    return answer


RANGE_FAULTS = ('ignore-range', 'wrong-range', '416')     # these wait for a request with Range


@fault(*RANGE_FAULTS)
def fault_range(space, request, respond, detail):
    """The whole; the part that begins `by` bytes later, which it says; or a refusal."""
    first = int(re.search(r'\d+', request.range).group())
    request.range = {'ignore-range': None, '416': 'bytes=%d-' % (1 << 60),
                     'wrong-range': 'bytes=%d-' % (first + detail.get('by', 100))}[detail['kind']]
    return respond()


@fault('changed')
def fault_changed(space, request, respond, detail):
    """From now on it is another object, of another ETag and, where told, another `size`."""
    space.change(request.names[0], detail.get('size'))
    return respond()


@fault('slow')
def fault_slow(space, request, respond, detail):
    space.closing.wait(detail.get('seconds', 0.2))
    return respond()


@fault('trickle')
def fault_trickle(space, request, respond, detail):
    """One byte at a time, `every` so many seconds."""
    answer = respond()

    def drops(blocks):
        for block in blocks:
            for k in range(len(block)):
                yield block[k:k + 1]
                space.closing.wait(detail.get('every', 0.1))
    answer.blocks = drops(answer.blocks)
    return answer


@fault('empty-page', 'short-page', 'repeat')
def fault_page(space, request, respond, detail):
    """No products but a next link; half as many as asked; the first page for ever, with next
    links that differ, or not if `same_link`."""
    request.trick = detail
    return respond()


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

    do_GET = do_POST = do_HEAD = do_CONNECT = do_PUT = do_DELETE = serve

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


class Matches:
    """The places of the records that pass a filter, searched for as far as they are asked for."""

    def __init__(self, places):
        self.places, self.found, self.lock = iter(places), [], threading.Lock()

    def first(self, count):
        with self.lock:
            self.found.extend(itertools.islice(self.places, max(0, count - len(self.found))))
        return self.found[:count]

    def count(self):
        return len(self.first(sys.maxsize))


class DataSpace(Loopback):
    """The stand-in of the Data Space: three catalogues, token endpoint, downloads, faults.

    content_size: bytes of every product, None for the recorded sizes.  max_transfers: None for
    any number; release_delay: seconds that a session still counts after its transfer.  clock: of
    the tokens.  page_limit: most products on a page, whatever is asked.  opensearch: 'on', or
    'retired-' with 404, 410, 301, 503, html, json or empty.  stac_next: method of next links.
    keep_pages: remember the pages of the catalogues, so that a benchmark does not measure them."""

    def __init__(self, records=None, tls=None, content_size=20000, max_transfers=4,
                 release_delay=0, expires_in=600, users=None, totp=None, page_limit=None,
                 latency=0, opensearch='on', clock=time.monotonic, refresh_expires_in=3600,
                 revoke_on_refresh=False, login_status=401, stac_next='GET', keep_pages=False):
        Loopback.__init__(self, tls)
        self.records = RECORDS if records is None else records
        self.content_size, self.latency, self.page_limit = content_size, latency, page_limit
        self.max_transfers, self.release_delay = max_transfers, release_delay
        self.opensearch_mode, self.stac_next = opensearch, stac_next
        self.pages = {} if keep_pages else None
        self.tokens = Tokens(clock, {'user': 'password'} if users is None else users, totp,
                             expires_in, refresh_expires_in, login_status, revoke_on_refresh)
        self.faults, self.requests, self.kinds = Switchboard(), [], collections.Counter()
        self.versions, self.sizes = collections.Counter(), {}
        self.transfers, self.peak_transfers, self.lingering = 0, 0, []
        self.bytes_sent, self.searches = collections.Counter(), {}
        rows = sorted((record.start, record.id, k) for k, record in enumerate(self.records))
        self.starts, self.order = [start for start, _, _ in rows], [k for _, _, k in rows]
        self.places = {id: k for _, id, k in rows}

    def __enter__(self):
        Loopback.__enter__(self)
        self.odata, self.opensearch, self.stac, self.token_url, self.logout_url = (
            self.url + path for path in (
                '/odata/v1', '/resto/api', '/v1', AUTH + 'token', AUTH + 'logout'))
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
        told = record.content if record.content is not None else self.content_size
        return self.sizes.get(record.id, record.size if told is None else told)

    def stated_size(self, record):
        return self.size(record) if record.stated is None else record.stated

    def body(self, record):
        """The bytes that a download of the record delivers now."""
        return body_of(record, self.size(record), self.versions[record.id])

    def md5(self, record):
        return md5_of(record.id, record.name, self.size(record), self.versions[record.id])

    def checksum(self, record):
        return self.md5(record) if record.checksum == 'MD5' else record.checksum

    def change(self, id, size=None):
        """Put another object in the place of a product, here and in the catalogues."""
        with self.lock:
            self.versions[id] += 1
            if size is not None:
                self.sizes[id] = size

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

    def matches(self, text, condition, key, descending):
        """The places of the records that pass, in the order asked; kept for the next page."""
        with self.lock:
            if len(self.searches) > 30:
                self.searches.clear()
            return self.searches.setdefault((text, key, descending), Matches(
                self.passing(condition, key, descending)))

    def passing(self, condition, key, descending):
        low = bisect.bisect_left(self.starts, condition.low)
        places = self.order[low:max(low, bisect.bisect_right(self.starts, condition.high))]
        if key != 'start':
            places.sort(key=lambda k: (getattr(self.records[k], key), self.records[k].id))
        for place in reversed(places) if descending else places:
            if condition.test(self.records[place]):
                yield place

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
            if answer.record:
                with self.lock:
                    self.bytes_sent[answer.record.id] += len(block)
        if answer.chunked and not answer.end:
            handler.wfile.write(b'0\r\n\r\n')


def reset_connection(connection):
    """Close with a reset instead of an orderly end."""
    plain = socket.socket(fileno=connection.detach())
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    plain.close()


# ---- names, certificates, proxies

def port_of(place):
    """The port on 127.0.0.1 of a server, of (host, port), or of a port."""
    return getattr(place, 'port', place[1] if isinstance(place, tuple) else place)


@contextlib.contextmanager
def names_on_loopback(mapping):
    """Names of the mapping lead to the server given there, whatever port is asked; 127.0.0.1 and
    localhost stay; any other name is an OSError, so nothing leaves this machine."""
    ports = {name: port_of(place) for name, place in mapping.items()}
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


class Certificate(typing.NamedTuple):
    """Paths of the certificate of an authority, and of a server's certificate and key."""
    authority: str
    server: str
    key: str

    def context(self):
        """For the `tls` of a stand-in."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server, self.key)
        return context


OPENSSL_SETTINGS = """
[req]
distinguished_name = subject
prompt = no
[subject]
CN = stand-in %s
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = %s
"""
OPENSSL_STEPS = """
req -x509 {new} -keyout authority.key -out authority.pem -config authority.cnf -extensions authority
req {new} -keyout server.key -out server.csr -config server.cnf
x509 -req -in server.csr -CA authority.pem -CAkey authority.key -set_serial 2 -out server.pem
  -days 30 -extfile server.cnf -extensions server
""".replace('\n  ', ' ').format(new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes')


def certificate(folder, names=()):
    """Make an authority and a server certificate, for the names and 127.0.0.1, in the folder.

    They satisfy VERIFY_X509_STRICT.  None where there is no openssl."""
    alternatives = ', '.join(['IP:127.0.0.1', 'DNS:localhost'] + ['DNS:' + name for name in names])
    for name in ('authority', 'server'):
        with open(os.path.join(folder, name + '.cnf'), 'w') as file:
            file.write(OPENSSL_SETTINGS % (name, alternatives))
    try:
        for step in OPENSSL_STEPS.split('\n')[1:-1]:
            subprocess.run(['openssl'] + step.split(), check=True, cwd=folder,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Certificate(*(os.path.join(folder, name) for name in (
        'authority.pem', 'server.pem', 'server.key')))


class Proxy(Loopback):
    """A proxy on the loopback interface: CONNECT, and requests with a whole url.

    `mapping` leads names to servers; other names get 502.  With a password, `user:secret`,
    a request without it gets 407.  `connections` counts what was passed on, `hosts` lists what was
    asked, `requests` as those of DataSpace."""

    def __init__(self, mapping=None, password=None):
        Loopback.__init__(self)
        self.ports = {name: port_of(place) for name, place in (mapping or {}).items()}
        self.password, self.connections, self.hosts, self.requests = password, 0, [], []

    def serve(self, handler):
        handler.close_connection = True
        url = urllib.parse.urlsplit(handler.path if '://' in handler.path else '//' + handler.path)
        port = self.ports.get(url.hostname, url.port if url.hostname == '127.0.0.1' else None)
        right = 'Basic ' + base64.b64encode((self.password or '').encode()).decode()
        with self.lock:
            self.hosts.append(url.hostname)
            self.requests.append((handler.command, handler.path, dict(handler.headers), b''))
        if self.password and handler.headers.get('Proxy-Authorization') != right:
            self.refuse(handler, 407)
        elif port is None:
            self.refuse(handler, 502)
        else:
            with self.lock:
                self.connections += 1
            with socket.create_connection(('127.0.0.1', port), 30) as far:
                self.open_way(handler, far, url)
                self.relay(handler.connection, far)

    def refuse(self, handler, status):
        handler.send_response(status)
        handler.send_header('Proxy-Authenticate', 'Basic realm="stand-in"')
        handler.send_header('Content-Length', '0')
        handler.send_header('Connection', 'close')
        handler.end_headers()

    def open_way(self, handler, far, url):
        """Confirm a tunnel, or pass a request on."""
        if handler.command == 'CONNECT':
            handler.wfile.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
            return
        target = urllib.parse.urlunsplit(('', '', url.path or '/', url.query, ''))
        lines = ['%s %s HTTP/1.1' % (handler.command, target)]
        lines += ['%s: %s' % (name, text) for name, text in handler.headers.items()
                  if not name.lower().startswith(('proxy-', 'connection'))]
        body = handler.rfile.read(int(handler.headers.get('Content-Length') or 0))
        far.sendall('\r\n'.join(lines + ['Connection: close', '', '']).encode() + body)

    def relay(self, near, far):
        other = {near: far, far: near}
        while not self.closing.is_set():
            for side in select.select([near, far], [], [], 0.05)[0]:
                data = side.recv(BLOCK)
                if not data:
                    return
                other[side].sendall(data)


ENVIRON = {"CDSE_USERNAME": "user", "CDSE_PASSWORD": "password"}


class Case(unittest.TestCase):
    """A test with a folder of its own, quiet logs, and no proxy from the outside."""

    maxDiff = None

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.waits = []
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


class StandInTest(unittest.TestCase):
    """The stand-in behaves as the service does, and its faults as their names say."""

    def ask(self, url, data=None, bearer=None, **headers):
        """Status, headers and body of one request that follows nothing."""
        if bearer:
            headers['Authorization'] = 'Bearer ' + bearer
        address = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(address.netloc, timeout=5)
        try:
            target = urllib.parse.urlunsplit(('', '', address.path, address.query, ''))
            headers = {name.replace('_', '-'): value for name, value in headers.items()}
            connection.request('POST' if data is not None else 'GET', target, data, headers)
            with connection.getresponse() as response:
                return response.status, response.headers, response.read()
        finally:
            connection.close()

    def page(self, url, **query):
        """Status and JSON of a page; `_` in a name stands for the `$` of OData."""
        pairs = [(name.replace('_', '$'), value) for name, value in query.items()]
        status, _, body = self.ask(url + '?' + urllib.parse.urlencode(pairs))
        return status, json.loads(body.decode())

    def grant(self, space, **fields):
        fields = fields or {'grant_type': 'password', 'username': 'user', 'password': 'password'}
        body = urllib.parse.urlencode(dict(fields, client_id='cdse-public'))
        status, _, body = self.ask(space.token_url, body)
        return status, json.loads(body.decode())

    def login(self, space):
        return self.grant(space)[1]['access_token']

    # -- records

    def test_records_are_as_recorded(self):
        self.assertEqual(len({record.id for record in RECORDS}), len(RECORDS))
        types = {record.producttype for record in RECORDS}
        self.assertLessEqual(set(TYPES_5P), types)
        for record in RECORDS:
            with self.subTest(record.name):
                self.assertLessEqual(record.start, record.end)
                self.assertRegex(record.start, r'^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$')
                for outline in outlines(record.footprint):
                    west, south, east, north = bounding_box(outline)
                    self.assertTrue(-180 <= west <= east <= 180 and -90 <= south <= north <= 90)

    def test_made_products_have_names_and_ids_of_their_own(self):
        orbits = made_products(120000, step_seconds=60)
        self.assertEqual(len({orbits[n].name for n in range(0, 120000, 500)}), 240)
        self.assertEqual(orbits[119999].orbit, 3697 + 119999 - 100000)
        same = made_products(20, same_start=True, points=301)
        self.assertEqual(len({record.start for record in same}), 1)
        self.assertEqual(len({record.name for record in same}), 20)
        self.assertEqual(len({record.id for record in same}), 20)
        self.assertEqual(len(same[0].footprint['coordinates'][0]), 301)

    def test_some_orbits_of_the_day_see_europe(self):
        seen = [any(-10 < lon < 30 and 35 < lat < 70 for lon, lat in outlines(record.footprint)[0])
                for record in one_day()]
        self.assertEqual(len(seen), 14)
        self.assertTrue(2 < sum(seen) < 9, seen)
        self.assertEqual({record.start[:10] for record in one_day()}, {'2018-07-01'})

    def test_content_is_made_blockwise_and_differs_by_place(self):
        record = RECORDS[0]
        whole = body_of(record, 200000)
        self.assertEqual(whole[:8], HDF5)
        self.assertEqual(len({whole[k:k + 1000] for k in range(0, 200000, 1000)}), 200)
        self.assertEqual(b''.join(content_blocks(record, 200000, start=131000)), whole[131000:])
        self.assertNotEqual(body_of(record, 200000, version=1)[8:], whole[8:])

    # -- OData

    def test_filters(self):
        attribute = ("Attributes/OData.CSC.%sAttribute/any(att:att/Name eq '%s' and "
                     "att/OData.CSC.%sAttribute/Value eq %s)")
        kind = attribute % ('String', 'productType', 'String', "'%s'")
        cases = [
            (kind % 'L2__NO2___', lambda r: r.producttype == 'L2__NO2___'),
            (attribute % ('Integer', 'orbitNumber', 'Integer', 33646), lambda r: r.orbit == 33646),
            ("contains(Name,'NRTI') and not contains(Name,'L2__')",
             lambda r: 'NRTI' in r.name and 'L2__' not in r.name),
            ("ContentDate/Start lt 2018-05-01 and ContentDate/End gt 2018-04-30T18:00:00.000Z",
             lambda r: r.start < '2018-05-01' and r.end > '2018-04-30T18'),
            ("startswith(Name,'S5P_RPRO') and (%s or %s)" % (
                kind % 'L2__CH4___', kind % 'L2__HCHO__'),
             lambda r: r.stream == 'RPRO' and r.producttype in ('L2__CH4___', 'L2__HCHO__')),
            ("Collection/Name eq 'SENTINEL-1'", lambda r: r.collection == 'SENTINEL-1'),
            ("OData.CSC.Intersects(area=geography'SRID=4326;POLYGON((0 40,9 40,9 50,0 50,0 40))')",
             lambda r: meets_box(r.footprint, (0, 40, 9, 50)))]
        with DataSpace() as space:
            for text, test in cases:
                with self.subTest(text):
                    status, page = self.page(space.odata + '/Products', _filter=text, _top=1000,
                                             _orderby='ContentDate/Start asc')
                    expected = sorted((r.start, r.id) for r in RECORDS if test(r))
                    self.assertEqual(status, 200)
                    self.assertTrue(expected)
                    self.assertEqual([(p['ContentDate']['Start'], p['Id']) for p in page['value']],
                                     expected)

    def test_odata_refuses_what_the_service_refuses(self):
        with DataSpace() as space:
            for status, query in (
                    (400, {'_filter': "Collection/Name eq 'Sentinel5P'"}), (400, {'top': 5}),
                    (400, {'_filter': "Nam eq 'x'"}),
                    (400, {'_filter': "ContentDate/Start gt now"}),
                    (422, {'_top': 1001}), (422, {'_skip': 10001}), (422, {'_top': 'x'}),
                    (400, {'_orderby': 'Size'}), (400, {'_select': 'Nam'})):
                with self.subTest(query):
                    self.assertEqual(self.page(space.odata + '/Products', **query)[0], status)
            detail = self.page(space.odata + '/Products', _skip=10001)[1]['detail'][0]
            self.assertEqual((detail['input'], detail['ctx']), ('10001', {'le': 10000}))

    def test_next_link_ends_at_the_wall(self):
        with DataSpace(made_products(12000, points=5), content_size=8) as space:
            url, rows = space.odata + '/Products?$top=1000&$orderby=ContentDate/Start', 0
            url += '&$select=Name'
            while url:
                page = json.loads(self.ask(url)[2].decode())
                rows, url = rows + len(page['value']), page.get('@odata.nextLink')
            self.assertEqual(rows, 11000)
            self.assertEqual(sorted(page['value'][0]), ['Id', 'Name'])

    def test_single_product(self):
        odd = [RECORDS[0]._replace(stated=-1, checksum=''), RECORDS[1]._replace(checksum='N/A')]
        with DataSpace(odd + list(RECORDS[2:])) as space:
            page = self.page('%s/Products(%s)' % (space.odata, RECORDS[2].id))[1]
            self.assertEqual(page['ContentLength'], 20000)
            self.assertEqual(page['Checksum'][0]['Value'],
                             hashlib.md5(body_of(RECORDS[2])).hexdigest())
            page = self.page('%s/Products(%s)' % (space.odata, RECORDS[0].id))[1]
            self.assertEqual((page['ContentLength'], page['Checksum']), (-1, []))
            self.assertEqual(self.page('%s/Products(%s)' % (space.odata, 'x' * 36))[0], 404)

    # -- OpenSearch

    def test_opensearch(self):
        with DataSpace() as space:
            for spelling in ('Sentinel5P', 'SENTINEL-5P'):
                url = '%s/collections/%s/search.json' % (space.opensearch, spelling)
                page = self.page(url, productType='L2__NO2___', maxRecords=2,
                                 sortParam='startDate')[1]
                links = {link['rel']: link['href'] for link in page['properties']['links']}
                following = json.loads(self.ask(links['next'])[2].decode())
                names = [f['properties']['title'] for f in page['features'] + following['features']]
                self.assertEqual(sorted(names), sorted(
                    r.name for r in RECORDS if r.producttype == 'L2__NO2___'))
                self.assertIsNone(page['properties']['totalResults'])
            record = next(r for r in RECORDS if r.producttype == 'L2__SO2___')
            inside = dict(productType='L2__SO2___', startDate=record.start,
                          completionDate=record.end)
            self.assertEqual(len(self.page(url, **inside)[1]['features']), 1)
            inside['startDate'] = record.start.replace('.000000Z', '.000001Z')
            self.assertEqual(len(self.page(url, **inside)[1]['features']), 0)
            for status, query in ((400, {'maxRecords': 2001}), (400, {'page': 502}),
                                  (400, {'productsType': 'x'}), (400, {'orbitNumber': 'x'})):
                with self.subTest(query):
                    self.assertEqual(self.page(url, **query)[0], status)
            self.assertEqual(self.page(url.replace('SENTINEL-5P', 'Sentinl2'))[0], 404)

    def test_retired_opensearch(self):
        for mode, status in (('retired-404', 404), ('retired-410', 410), ('retired-301', 301),
                             ('retired-html', 200), ('retired-empty', 200), ('retired-503', 503)):
            with self.subTest(mode), DataSpace(opensearch=mode) as space:
                answer = self.ask(space.opensearch + '/collections/Sentinel5P/search.json')
                self.assertEqual(answer[0], status)
                self.assertNotIn(b'FeatureCollection', answer[2])

    # -- STAC

    def test_stac(self):
        with DataSpace() as space:
            page = self.page(space.stac + '/search', collections='sentinel-5p-l2-no2-nrti', limit=2,
                             sortby='-properties.datetime')[1]
            again = json.loads(self.ask(page['links'][-1]['href'])[2].decode())
            items = page['features'] + again['features']
            self.assertEqual([item['id'][9:19] for item in items], ['L2__NO2___'] * 3)
            asset = items[0]['assets']['netcdf']
            uuid = re.search(r'Products\(([^)]*)\)', asset['alternate']['https']['href']).group(1)
            self.assertEqual(asset['file:checksum'], 'd50110' + space.md5(space.find(uuid)))
            self.assertEqual(self.page(space.stac + '/search', collections='x')[1]['features'], [])
            self.assertEqual(self.page(space.stac + '/collections/x')[0], 404)
            known = self.page(space.stac + '/collections', limit=200)[1]['collections']
            known = {one['id']: one['summaries']['product:type'] for one in known}
            self.assertEqual(known['sentinel-5p-l1-ra-bd5-nrti'], ['L1B_RA_BD5'])
            self.assertEqual(known['sentinel-1-grd'], ['IW_GRDH_1S'])
            self.assertEqual(self.page(space.stac + '/collections/sentinel-5p-l2-co-offl')[0], 200)
            answer = self.ask(space.stac + '/search?token=x')
            self.assertEqual((answer[0], answer[1].get_content_type()), (500, 'text/plain'))

    def test_stac_with_post(self):
        search = {'collections': ['sentinel-5p-l2-o3-tcl-offl'], 'limit': 1,
                  'datetime': '2018-05-01T00:00:00Z/2018-05-02T00:00:00Z', 'bbox': [0, -5, 9, 5],
                  'filter': {'op': '=', 'args': [{'property': 'product:type'}, 'L2__O3_TCL']},
                  'fields': {'include': ['assets', 'properties.datetime']}}
        ids = []
        with DataSpace() as space:
            while search:
                body = json.dumps(search).encode()
                page = json.loads(self.ask(space.stac + '/search', body)[2].decode())
                ids += [item['id'] for item in page['features']]
                self.assertEqual(sorted(page['features'][0]),
                                 ['assets', 'collection', 'id', 'properties'])
                search = next((link['body'] for link in page['links']
                               if link['rel'] == 'next'), None)
        self.assertEqual(len(ids), 2)
        for id in ids:
            self.assertRegex(id, '^S5P_OFFL_L2__O3_TCL_2018.*_01_')

    def test_box_over_the_date_line_is_read_the_long_way_round(self):
        with DataSpace() as space:
            def found(box):
                query = dict(collections='sentinel-5p-l2-co-nrti', bbox=box, limit=100)
                return len(self.page(space.stac + '/search', **query)[1]['features'])
            self.assertEqual(found('170,-90,-170,90'), found('-170,-90,170,90'))

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
        record, body = RECORDS[0], body_of(RECORDS[0])
        with DataSpace() as space:
            bearer, href = self.login(space), space.href(record)
            etag = self.ask(href, bearer=bearer)[1]['ETag']
            for text, status, part in (
                    ('bytes=5-9', 206, body[5:10]), ('bytes=19990-', 206, body[19990:]),
                    ('bytes=-10', 206, body[-10:]), ('bytes=9-99999', 206, body[9:]),
                    ('lines=1-2', 200, body)):
                with self.subTest(text):
                    answer = self.ask(href, bearer=bearer, Range=text, If_Range=etag)
                    self.assertEqual((answer[0], answer[2]), (status, part))
            answer = self.ask(href, bearer=bearer, Range='bytes=5-', If_Range='"x"')
            self.assertEqual((answer[0], answer[2]), (200, body))
            answer = self.ask(href, bearer=bearer, Range='bytes=20000-')
            self.assertEqual((answer[0], answer[1]['Content-Range']), (416, 'bytes */20000'))
            quoted = '%s/Products(%%27%s%%27)/$value' % (space.odata, record.id)
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
            self.assertEqual(space.count('value'), 4)

    # -- faults

    def outcome(self, space, bearer, **headers):
        """What a client meets: a status and the number of bytes, or the name of an error."""
        try:
            status, _, body = self.ask(space.href(RECORDS[0]), bearer=bearer, **headers)
        except http.client.IncompleteRead as error:
            return 'short', len(error.partial)
        except http.client.RemoteDisconnected:
            return 'dropped', 0
        except ConnectionResetError:
            return 'reset', 0
        return status, len(body) if body != space.body(RECORDS[0]) else 'right'

    def test_faults_of_downloads(self):
        cases = [
            ('fin', ('short', 10000)), ('cut', (200, 10000)), ('chunked', ('short', 10000)),
            ('chunked-ok', (200, 'right')), ('flip', (200, 20000)), ('empty', (200, 0)),
            ('no-length', (200, 'right')), ('drop', ('dropped', 0)), ('slow', (200, 'right')),
            ('trickle', (200, 'right')), ('changed', (200, 'right'))]
        for kind, expected in cases:
            with self.subTest(kind), DataSpace() as space:
                bearer, old = self.login(space), space.body(RECORDS[0])
                space.faults.add(kind, every=0, seconds=0)
                self.assertEqual(self.outcome(space, bearer), expected)
                self.assertEqual(self.outcome(space, bearer), (200, 'right'))
                self.assertEqual(space.body(RECORDS[0]) != old, kind == 'changed')
        for kind in ('400', '401', '403', '404', '429', '500', '502', '503'):
            with self.subTest(kind), DataSpace() as space:
                space.faults.add(kind, times=None)
                bearer = self.login(space)
                self.assertEqual({self.outcome(space, bearer)[0] for _ in range(2)}, {int(kind)})

    def test_reset(self):
        with DataSpace() as space:
            bearer = self.login(space)
            space.faults.add('rst', at=0)
            with self.assertRaises((ConnectionResetError, http.client.IncompleteRead)):
                self.ask(space.href(RECORDS[0]), bearer=bearer)

    def test_faults_of_ranges(self):
        with DataSpace() as space:
            bearer, body = self.login(space), space.body(RECORDS[0])
            for kind, status, part in (('ignore-range', 200, body), ('416', 416, None),
                                       ('wrong-range', 206, body[150:])):
                with self.subTest(kind):
                    space.faults.add(kind)
                    self.assertEqual(self.outcome(space, bearer), (200, 'right'))
                    answer = self.ask(space.href(RECORDS[0]), bearer=bearer, Range='bytes=50-')
                    self.assertEqual(answer[0], status)
                    self.assertIn(answer[2] if part else None, (part,))

    def test_pages_instead_of_files(self):
        with DataSpace() as space:
            bearer, href = self.login(space), space.href(RECORDS[0])
            for kind, start in (('html', b'<!DOCTYPE html>'), ('json', b'{"code"'), ('zip', ZIP)):
                space.faults.add(kind)
                status, _, body = self.ask(href, bearer=bearer)
                self.assertEqual((status, body[:len(start)]), (200, start))
            with zipfile.ZipFile(io.BytesIO(body)) as archive:
                name = RECORDS[0].name
                self.assertEqual(archive.read('%s/%s' % (name[:-3], name)), space.body(RECORDS[0]))
            space.faults.add('redirect', to='/elsewhere{target}', status=307)
            answer = self.ask(href, bearer=bearer)
            self.assertEqual((answer[0], answer[1]['Location'][:20]), (307, '/elsewhere/odata/v1/'))
            space.faults.add('429', retry_after='date')
            self.assertIn('GMT', self.ask(href, bearer=bearer)[1]['Retry-After'])

    def test_stalls_end_with_the_server(self):
        for kind in ('stall-headers', 'stall-body'):
            with self.subTest(kind), DataSpace() as space:
                space.faults.add(kind)
                bearer, seen = self.login(space), []
                thread = threading.Thread(target=lambda: seen.append(self.outcome(space, bearer)))
                thread.start()
                while space.count('value') == 0:
                    thread.join(0.01)
                self.assertEqual(seen, [])
            thread.join()
            self.assertIn(seen[0][0], ('dropped', 'short', 'reset'))

    def test_faults_of_pages(self):
        with DataSpace() as space:
            url = space.odata + '/Products?$top=4'
            whole = [p['Id'] for p in json.loads(self.ask(url)[2].decode())['value']]
            space.faults.add('empty-page', on='odata')
            page = json.loads(self.ask(url)[2].decode())
            self.assertEqual(page['value'], [])
            page = json.loads(self.ask(page['@odata.nextLink'])[2].decode())
            self.assertEqual([p['Id'] for p in page['value']], whole)
            space.faults.add('short-page', on='odata')
            first = json.loads(self.ask(url)[2].decode())
            second = json.loads(self.ask(first['@odata.nextLink'])[2].decode())
            self.assertEqual([p['Id'] for p in first['value'] + second['value']][:4], whole)
            space.faults.add('repeat', on='odata', times=None)
            for _ in range(3):
                page = json.loads(self.ask(url)[2].decode())
                self.assertEqual([p['Id'] for p in page['value']], whole)
                url = page['@odata.nextLink']
            space.faults.clear()
            space.faults.add('cut-json', on='odata')
            with self.assertRaises(ValueError):
                json.loads(self.ask(url)[2].decode())

    def test_faults_choose_their_requests(self):
        with DataSpace() as space:
            bearer = self.login(space)
            space.faults.add('503', after=1, times=2, name=RECORDS[0].id)
            self.assertEqual([self.outcome(space, bearer)[0] for _ in range(5)],
                             [200, 503, 503, 200, 200])

    # -- names, certificates, proxies

    def test_names_stay_on_this_machine(self):
        with DataSpace() as space, names_on_loopback({'catalogue.example.eu': space}):
            url = 'http://catalogue.example.eu/odata/v1/Products?$top=1'
            page = json.loads(self.ask(url)[2].decode())
            self.assertIn('http://catalogue.example.eu/odata/', page['@odata.nextLink'])
            with self.assertRaises(OSError):
                self.ask('http://another.example.eu/')

    def test_certificate_is_accepted_by_strict_clients(self):
        with tempfile.TemporaryDirectory() as folder:
            made = certificate(folder, ['catalogue.example.eu'])
            if made is None:
                self.skipTest('there is no openssl')
            trust = ssl.create_default_context(cafile=made.authority)
            trust.verify_flags |= ssl.VERIFY_X509_STRICT
            with DataSpace(tls=made.context()) as space, \
                    names_on_loopback({'catalogue.example.eu': space}):
                for host in ('catalogue.example.eu', space.url[8:]):
                    url = 'https://%s/odata/v1/Products?$top=1' % host
                    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                                         urllib.request.HTTPSHandler(context=trust))
                    with opener.open(url, timeout=5) as response:
                        self.assertEqual(len(json.loads(response.read().decode())['value']), 1)

    def test_proxy(self):
        with DataSpace() as space, Proxy({'catalogue.example.eu': space}, 'me:secret') as proxy:
            target, words = 'http://catalogue.example.eu/odata/v1/Products?$top=1', b'me:secret'
            for header, status in (({}, 407), ({'Proxy-Authorization': 'Basic ' + base64.b64encode(
                    words).decode()}, 200)):
                connection = http.client.HTTPConnection('127.0.0.1', proxy.port, timeout=5)
                connection.request('GET', target, headers=header)
                with connection.getresponse() as response:
                    self.assertEqual(response.status, status)
                connection.close()
            tunnel = http.client.HTTPConnection('127.0.0.1', proxy.port, timeout=5)
            tunnel.set_tunnel('catalogue.example.eu', 443, header)
            tunnel.request('GET', '/odata/v1/Products?$top=1')
            with tunnel.getresponse() as response:
                self.assertEqual(response.status, 200)
            tunnel.close()
            self.assertEqual((proxy.connections, set(proxy.hosts)), (2, {'catalogue.example.eu'}))


HERE = os.path.dirname(os.path.abspath(cso.__file__))
NAMES = ["%s.dataspace.copernicus.eu" % name for name in
         ("catalogue", "download", "zipper", "identity", "stac")]
URLS = ("url={0}/odata/v1", "download_url={0}/odata/v1/Products({{product_id}})/$value",
        "token_url={0}" + AUTH + "token")


def at(space):
    """The arguments that turn example.rc to a stand-in."""
    return [word for url in URLS for word in ("--set", url.format(space.url))]


def readme(kind):
    """The code blocks of the README of a kind: "" for indented commands, "python", "sh"."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as text:
        text = text.read()
    if kind:
        return re.findall(r"(?ms)^```%s\n(.*?)^```" % kind, text)
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return [textwrap.dedent(block) for block in re.findall(r"(?m)(?:^    .*\n)+", text)]


def run_program(*args, **options):
    """Start the program as a user does; returns the process."""
    environ = dict(os.environ, PYTHONPATH=HERE, PYTHONWARNINGS="error", **options.pop("env", {}))
    return subprocess.Popen([sys.executable, "-m", "cso_dataspace"] + list(args), env=environ,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True, **options)


class MainTest(Case):
    """The command line, as a user meets it."""

    def setUp(self):
        Case.setUp(self)
        os.environ.update(ENVIRON)
        self.space = self.use(DataSpace(one_day()))
        self.rc = os.path.join(HERE, "example.rc")
        self.common = at(self.space) + ["--env", "my.work=" + self.folder]

    def names(self, ending):
        return [name for name in self.files() if name.endswith(ending)]

    def test_run_writes_the_table_and_the_checked_files(self):
        status, out, err = self.run_main("run", self.rc, *self.common)
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
        again = self.run_main("run", self.rc, *self.common)
        self.assertEqual(again[:2], (0, "8 of 8 files here: 8 present\n"))
        self.assertEqual((self.space.count("value"), self.space.logins), (8, 1))

    def test_parts_are_all_rows_once(self):
        for index in "0", "1", "2", "3":        # arrays may count from 0 or from 1
            status, out, _ = self.run_main("run", self.rc, "--part", index + "/3", *self.common)
            self.assertEqual(status, 0)
        self.assertEqual((len(self.names(".nc")), self.space.count("value")), (8, 8))

    def test_dry_run_shows_requests_files_and_bytes_and_does_nothing(self):
        status, out, err = self.run_main("run", self.rc, "--dry-run", *self.common)
        self.assertEqual(status, 0, err)
        self.assertIn("request: %s/Products?$filter=Collection/Name eq" % self.space.odata, out)
        self.assertIn("8 files, 160.0 kB\n", out)
        self.assertEqual((self.files(), self.space.count("value"), self.space.logins), ([], 0, 0))

    def test_report_names_every_file_and_failures_give_status_3(self):
        self.space.faults.add("404", on="value", times=1)
        status, out, err = self.run_main("run", self.rc, "--report", self.path("report.csv"),
                                         *self.common)
        self.assertEqual(status, 3)
        self.assertIn("error: 1 files failed; run the same command again to go on\n", err)
        lines = self.read("report.csv").decode().splitlines()
        self.assertEqual(lines[0], "filename;state;bytes;seconds;message")
        states = sorted(line.split(";")[1] for line in lines[1:])
        self.assertEqual(states, ["failed"] + ["verified"] * 7)
        self.assertEqual(self.run_main("run", self.rc, *self.common)[0], 0)

    def test_download_of_a_table_or_a_href(self):
        self.run_main("inquire", self.rc, *self.common)
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
        status, out, err = self.run_main("run", self.rc, *self.common)
        done = re.findall(r"(?m)^S5P_\S+\.nc: verified, 20.0 kB in [\d.]+ s, [\d.]+ \w+/s$", err)
        self.assertEqual(len(done), 8, err)
        self.assertNotIn("\r", err)
        self.assertEqual(self.run_main("run", self.rc, "-q", *self.common)[2], "")

    def test_mistakes_end_with_one_line_and_status(self):
        missing = self.path("none.rc")
        several = self.write("two.rc", "a.timerange.start : 2018-07-01\nb.timerange.start : 2018-07-02\n")
        broken = self.write("table.csv", "filename;href\nx.nc\n")
        for args, status, said in (
                (["run", missing], 1, "error: %s: can't be read" % missing),
                (["run", several], 1, "choose one: --rcbase a or b"),
                (["run", self.rc, "--part", "3"], 1, "--part: '3' is not I/N"),
                (["run", self.rc, "--set", "area=1,2,3"], 1, "--set area:1: area: four numbers"),
                (["run", self.rc, "--set", "download.dir=%{orbits}"], 1, "no column orbits"),
                (["download", broken], 1, "table.csv:2: 1 fields; the header has 2"),
                (["download", "nosuch.csv"], 1, "nosuch.csv: can't be read"),
                (["run"], 2, "RCFILE"), (["dowload"], 2, "invalid choice"), ([], 2, "COMMAND"),
                (["run", self.rc, "--set", "x"], 2, "'x' is not NAME=VALUE"),
                (["--version"], 0, "cso_dataspace %s" % cso.__version__)):
            with self.subTest(args=args):
                got, out, err = self.run_main(*(args + (self.common if args[1:] and args[1] == self.rc
                                                        else [])))
                self.assertEqual(got, status, err)
                self.assertIn(said, out + err)
                self.assertNotIn("Traceback", err)
                if status == 1:
                    self.assertEqual(err.count("error: "), 1, err)
        self.assertEqual(self.names(".nc"), [])

    def test_misspelt_setting_is_pointed_out(self):
        _, _, err = self.run_main("inquire", self.rc, *(self.common + [
            "--set", "cso.s5p.no2.area.minmum=3"]))
        self.assertIn("cso.s5p.no2.area.minmum is no setting of this program and is ignored; is "
                      "area.minimum meant?", err)

    def test_help_fits_a_screen_and_shows_an_example(self):
        for command in cso.COMMANDS:
            with self.subTest(command=command):
                status, out, _ = self.run_main(command, "--help")
                self.assertEqual(status, 0)
                self.assertIn("example: cso_dataspace " + command, out)
                self.assertLessEqual(out.count("\n"), 30)

    def test_check_tells_what_to_do(self):
        status, out, err = self.run_main("check", self.rc, *self.common)
        self.assertEqual((status, out.count(" ok: "), out.count("\n")), (0, 6, 6), out + err)
        del os.environ["CDSE_PASSWORD"]
        status, out, err = self.run_main("check", self.rc, *self.common)
        self.assertEqual((status, out.count("NOT ok")), (1, 2), out)
        self.assertIn("machine zipper.dataspace.copernicus.eu login USER", out)

    def test_console_without_utf8(self):
        rc = self.write("x.rc", "grid : 1 \u00d7 1\n")
        process = run_program("settings", rc, env={"PYTHONIOENCODING": "ascii"})
        out, err = process.communicate()
        self.assertEqual((process.returncode, out), (0, "grid : 1 \\xd7 1   ! %s:1\n" % rc), err)

    def test_reader_that_leaves_early(self):
        rc = self.write("long.rc", "".join("k%d : %s\n" % (n, "x" * 99) for n in range(5000)))
        process = run_program("settings", rc)
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        self.assertEqual((process.wait(), err), (1, ""))


class ScreenTest(unittest.TestCase):
    """The line of progress."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def test_one_line_cut_to_the_window_ten_times_a_second(self):
        now, stream = [0.0], self.Terminal()
        screen = cso.Screen(stream, clock=lambda: now[0])
        screen.width = lambda: 40
        progress = cso.Progress([cso.Task("", "a", 10 ** 9), cso.Task("", "b", 10 ** 9)], screen,
                                clock=lambda: now[0])
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

    @unittest.skipUnless(hasattr(os, "openpty"), "no pseudo-terminals here")
    def test_on_a_pseudo_terminal(self):
        with tempfile.TemporaryDirectory() as folder, DataSpace(one_day()) as space:
            master, slave = os.openpty()
            command = [sys.executable, "-m", "cso_dataspace", "run",
                       os.path.join(HERE, "example.rc"), "--env", "my.work=" + folder]
            environ = dict(os.environ, PYTHONPATH=HERE, COLUMNS="50", **ENVIRON)
            with subprocess.Popen(command + at(space), env=environ, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=slave) as process:
                os.close(slave)
                seen = b""
                while True:
                    try:
                        data = os.read(master, 65536)
                    except OSError:
                        break
                    if not data:
                        break
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
             "_cds.box_overlap(None, [0, 0, 1, 1]), sorted(_cds.__all__) == sorted(set(_cds.__all__)))"],
            cwd=self.folder, universal_newlines=True)
        self.assertEqual(out, "cso_dataspace (True, None) True\n")

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

    @unittest.skipUnless(os.name == "posix" and shutil.which("openssl"), "no openssl here")
    def test_every_command_and_snippet_of_the_readme_runs(self):
        """Against the real names, which lead to a stand-in with https, in a fresh folder."""
        made = certificate(self.folder, NAMES)
        space = self.use(DataSpace(one_day(), tls=made.context(),
                                   users={"me@example.com": "secret"}))
        self.use(names_on_loopback({name: space for name in NAMES}))
        os.environ.update(SSL_CERT_FILE=made.authority, SLURM_ARRAY_TASK_ID="2")
        shutil.copy(os.path.join(HERE, "example.rc"), self.folder)
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
        command = ["run", os.path.join(HERE, "example.rc"), "--env", "my.work=" + folder] + at(space)
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


if __name__ == "__main__":
    if sys.argv[1:] == ["demo"]:
        sys.exit(demo())
    if sys.argv[1:] == ["benchmark"]:
        sys.exit(benchmark())
    unittest.main()
